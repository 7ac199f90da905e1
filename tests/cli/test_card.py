"""Model cards: metadata that the Hub accepts, figures that are the folder's, nothing that is not known."""

import shutil

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

import hf_moe
from hf_moe.hub import MARKER, write_model_card
from tests.conftest import tiny_model


@pytest.fixture
def folder(upcycled, tmp_path):
    return shutil.copytree(upcycled, tmp_path / "model")


def test_card_of_an_upcycled_model(command, folder):
    code, out, _ = command("card", folder)
    assert (code, out) == (0, f"{folder}/README.md\n")
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["hf_moe", "mixture-of-experts", "upcycle"],
    }
    assert "| Source | storyteller |" in card.text
    assert "| Routed experts | 3, 2 per token |" in card.text
    for unknown in ("None", "## Conversion check", "## Fine-tuning"):
        assert unknown not in card.text


def test_a_source_on_the_hub_becomes_the_base_model(folder):
    config = hf_moe.HfMoeConfig.from_pretrained(folder)
    config.provenance |= {"source": "someone/dense", "revision": "0" * 40}
    config.save_pretrained(folder)
    data = ModelCard.load(write_model_card(folder)).data
    assert (data.base_model, data.base_model_relation) == ("someone/dense", "finetune")


def test_figures_of_the_conversion_are_shown_when_known(folder):
    config = hf_moe.HfMoeConfig.from_pretrained(folder)
    config.provenance["check"] = {"max_abs_diff": 1.25e-5, "kl": 0.0, "perplexity_b": 3.25}
    config.save_pretrained(folder)
    text = write_model_card(folder).read_text()
    assert "| Largest difference between two logits | 1.25e-05 |" in text
    assert "| Perplexity of this model | 3.25 |" in text
    assert "Perplexity of the source" not in text


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_parameters_are_counted_as_the_model_has_them(tmp_path, tied):
    model = tiny_model(tie_word_embeddings=tied, n_shared_experts=1)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    text = write_model_card(tmp_path).read_text()
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = sum(parameter[: 7 - 3].numel() for name, parameter in model.named_parameters() if ".mlp.experts." in name)
    assert f"| Parameters | {total:,} |" in text
    assert f"| Active parameters per token | {total - idle:,} |" in text
    assert "| Shared experts | 1 of width 24 |" in text
    assert "Where it comes from" not in text


def test_the_card_loads_what_it_says(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    text = write_model_card(folder).read_text()
    scope = {}
    exec(text.split("```python")[1].split("```")[0], scope)
    assert scope["model"].config.num_experts == 3


def test_someone_elses_readme_stays(command, folder):
    (folder / "README.md").write_text("# Mine\n")
    code, _, err = command("card", folder)
    assert code == 2
    assert "README.md" in err
    assert (folder / "README.md").read_text() == "# Mine\n"
    (folder / "README.md").write_text(f"# Old\n{MARKER}\n")
    assert command("card", folder).code == 0


def test_a_card_changes_nothing_about_the_model(folder):
    write_model_card(folder)
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_experts == 3
