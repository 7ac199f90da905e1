"""What a conversion says of itself: the comparison and the origin, in the card and in an hf_moe model's config."""

import hashlib
import json

import pytest
from hf_moe.conversion import export_checkpoint, import_checkpoint, upcycle
from huggingface_hub import ModelCard
from transformers import AutoConfig

from hf_moe.hub import write_model_card
from hf_moe.version import __version__


def convert(function, checkpoint, folder, **options):
    if function == "import":
        return checkpoint("mixtral"), import_checkpoint(checkpoint("mixtral"), folder, progress=False, **options)
    dense = checkpoint("llama")
    if function == "upcycle":
        return dense, upcycle(dense, folder, experts=5, top_k=2, seed=9, progress=False, **options)
    moe = folder.parent / "hf_moe"
    upcycle(dense, moe, experts=5, top_k=2, verify=False, progress=False)
    return moe, export_checkpoint(moe, folder, to="mixtral", progress=False, **options)


@pytest.mark.parametrize("function", ["upcycle", "import", "export"])
def test_comparison_and_origin_are_written_down(function, checkpoint, tmp_path):
    source, report = convert(function, checkpoint, tmp_path / "out")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    rows = {
        "Largest difference between two logits": f"{report['max_abs_diff']:.4g}",
        "KL divergence per token, nats": f"{report['kl']:.4g}",
        "Perplexity of the source": f"{report['perplexity_a']:.4g}",
        "Perplexity of this model": f"{report['perplexity_b']:.4g}",
        "Source": source.name,
        "Method": function,
        "SHA-256 of model.safetensors": digest,
        "hf_moe version": __version__,
        "Parameters": f"{report['total_params']:,}",
        "Active parameters per token": f"{report['active_params']:,}",
        **({"Strategy": "copy", "Seed": "9", "`top_k`": "`2`"} if function == "upcycle" else {}),
        **({"Written as": "mixtral", "Layout of the experts": "per-expert"} if function == "export" else {}),
    }
    for title, value in rows.items():
        assert f"| {title} | {value} |" in card.text
    family = "mixtral" if function == "export" else "hf_moe"
    assert card.data.tags == [family, "mixture-of-experts", function]
    assert f"# out\n\nA mixture-of-experts model of the {family} family" in card.text
    assert ("trust_remote_code" in card.text) == (function != "export")
    text = (tmp_path / "out" / "README.md").read_text()
    assert str(tmp_path) not in text
    assert write_model_card(tmp_path / "out").read_text() == text  # an exported model's origin is in its card alone
    config = AutoConfig.from_pretrained(tmp_path / "out")
    if function != "export":
        assert config.provenance["sha256"] == {"model.safetensors": digest}
        assert config.provenance["check"] == {name: report[name] for name in config.provenance["check"]}
        assert {"max_abs_diff", "kl", "top1_agreement", "perplexity_b"} <= set(config.provenance["check"])
        assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]


def test_the_licence_of_the_source_goes_along(checkpoint, tmp_path, capsys):
    dense = checkpoint("llama")
    try:
        (dense / "README.md").write_text("---\nlicense: apache-2.0\ndatasets: [some/pages]\n---\n# The dense model\n")
        convert("upcycle", checkpoint, tmp_path / "moe", verify=False)
        data = ModelCard.load(tmp_path / "moe" / "README.md").data
        assert (data.license, data.datasets, data.base_model) == ("apache-2.0", ["some/pages"], None)
        (dense / "README.md").write_text("---\nlicense: [\n---\n")
        convert("upcycle", checkpoint, tmp_path / "other", verify=False)
    finally:
        (dense / "README.md").unlink(missing_ok=True)
    assert ModelCard.load(tmp_path / "other" / "README.md").data.license is None
    assert "nothing is taken from the model card: " in capsys.readouterr().err


def test_without_the_comparison_the_card_has_none(checkpoint, tmp_path):
    convert("upcycle", checkpoint, tmp_path / "out", verify=False)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "Conversion check" not in text and "Where it comes from" in text
    assert "check" not in AutoConfig.from_pretrained(tmp_path / "out").provenance
