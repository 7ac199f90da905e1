"""Dense sources: their weights in hf_moe's dense blocks compute the same, and what cannot be carried is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_moe.conversion import import_checkpoint, upcycle
from hf_moe.conversion.families import DENSE_FAMILIES
from hf_moe.conversion.files.source import open_source
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

from hf_moe import HfMoeForCausalLM
from tests.conftest import tokens
from tests.conversion.conftest import DENSE_CASES, GEMMA, SIZES, build


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def without_experts(folder: Path, dtype: torch.dtype = torch.float32) -> HfMoeForCausalLM:
    """The source's own bytes in an hf_moe model whose layers are all dense."""
    source = open_source(folder, DENSE_FAMILIES)
    config = source.hf_moe_config(mlp_layer_types=["dense"] * source.hf_moe_fields["num_hidden_layers"])
    model = HfMoeForCausalLM._from_config(config, dtype=dtype).eval()
    outputs = source.outputs(config)
    state = {name: torch.cat(list(output.pieces())).clone() for name, output in outputs.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) == model.all_tied_weights_keys.keys()
    model.tie_weights()
    return model


def test_every_family_has_a_case():
    assert {model_type for model_type, _ in DENSE_CASES.values()} == set(DENSE_FAMILIES)


@pytest.mark.parametrize("case", DENSE_CASES)
def test_dense_blocks_compute_what_the_source_computes(case, checkpoint):
    theirs, ours = load(checkpoint(case)), without_experts(checkpoint(case))
    ids = tokens(length=31, vocab_size=61)
    padding = torch.ones_like(ids)
    padding[0, :4] = 0
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
        mine, other = ours(ids, attention_mask=padding).logits, theirs(ids, attention_mask=padding).logits
        torch.testing.assert_close(mine[:, 4:], other[:, 4:], rtol=0, atol=1e-5)
    assert ours.num_parameters() == theirs.num_parameters()


@pytest.mark.parametrize("case", ["gemma", "gemma3", "granite", "phi4-mini", "smollm3"])
def test_bfloat16_is_rounded_where_the_source_rounds(case, tmp_path):
    """Gemma multiplies by 1 + weight in float32 and rounds sqrt(D) to the dtype of the embeddings."""
    model_type, changes = DENSE_CASES[case]
    build(model_type, torch.bfloat16, **changes).save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    ours = without_experts(tmp_path, torch.bfloat16)
    ids = tokens(length=31, vocab_size=61)
    with torch.inference_mode():
        assert theirs.dtype == torch.bfloat16
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)


LAYOUTS = {
    "hub": {},  # language_model.model.layers ...
    "in-memory": {"save_original_format": False},  # model.language_model.layers ...
}


@pytest.fixture(scope="module", params=LAYOUTS)
def pictures(request, tmp_path_factory) -> Path:
    """A Gemma 3 that sees pictures."""
    torch.manual_seed(5)
    vision = {"hidden_size": 12, "intermediate_size": 14, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 14, "patch_size": 7}
    config = Gemma3Config(text_config={**SIZES, **GEMMA}, vision_config=vision, mm_tokens_per_image=1)
    folder = tmp_path_factory.mktemp("gemma3") / request.param
    Gemma3ForConditionalGeneration(config).save_pretrained(folder, **LAYOUTS[request.param])
    return folder


def test_the_language_model_of_a_gemma_that_sees_pictures(pictures, tmp_path):
    theirs, ours = load(pictures), without_experts(pictures)
    ids = tokens(length=31, vocab_size=61)
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    report = upcycle(pictures, tmp_path / "moe", experts=3, top_k=2, progress=False)
    assert report["max_abs_diff"] <= 1e-4
    assert report["ignored_config_keys"] == []
    assert load(tmp_path / "moe").config.provenance["model_type"] == "gemma3_text"


def test_import_says_that_it_is_dense(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"is a gemma3, a dense model: upcycle it\. Importing takes .*, llama4[,.]"):
        import_checkpoint(pictures, tmp_path / "moe", progress=False)


def test_a_tensor_beside_the_parts_that_are_known_is_refused(pictures, tmp_path):
    folder = Path(shutil.copytree(pictures, tmp_path / "gemma3"))
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"audio_tower.weight": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds audio_tower\.weight"):
        upcycle(folder, tmp_path / "moe", experts=3, top_k=2, progress=False)


def edited(source: Path, folder: Path, **changes) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


def test_a_field_that_only_the_language_model_alone_reads_is_refused(pictures, tmp_path):
    said = json.loads((pictures / "config.json").read_text())["text_config"] | {"final_logit_softcapping": 3.0}
    folder = edited(pictures, tmp_path / "gemma3", text_config=said)
    with pytest.raises(ValueError, match=r"gemma3 field text_config\.final_logit_softcapping=3\.0 cannot be carried"):
        upcycle(folder, tmp_path / "moe", experts=3, top_k=2, progress=False)


def test_a_quantized_model_that_sees_pictures_is_refused(pictures, tmp_path):
    folder = edited(pictures, tmp_path / "gemma3", quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match="gemma3 is quantized"):
        upcycle(folder, tmp_path / "moe", experts=3, top_k=2, progress=False)


ROTATED = {"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": 0.5}
REFUSED = {
    "gemma2-bidirectional": ("gemma2", {"use_bidirectional_attention": True}, "gemma2 field use_bidirectional_att"),
    "gemma3-bidirectional": ("gemma3", {"use_bidirectional_attention": True}, "gemma3_text field use_bidirectional"),
    "gemma3-partial": (
        "gemma3",
        {"rope_parameters": {"sliding_attention": ROTATED, "full_attention": ROTATED}},
        "gemma3_text field rope_parameters has partial_rotary_factor=0.5 for sliding_attention",
    ),
    "phi3-dropout": ("phi3", {"resid_pdrop": 0.1}, "phi3 field resid_pdrop=0.1 cannot be carried; only 0.0 can"),
    "olmo2-partial": ("olmo2", {"rope_parameters": ROTATED}, "olmo2 field partial_rotary_factor=0.5"),
    "smollm3-layers": ("smollm3", {"no_rope_layers": [1, 2, 0]}, r"no_rope_layers \(\[1, 2, 0\]\) must hold 1"),
}


@pytest.mark.parametrize(("case", "changes", "match"), REFUSED.values(), ids=REFUSED)
def test_refuses_what_it_cannot_carry(case, changes, match, checkpoint, tmp_path):
    folder = edited(checkpoint(case), tmp_path / case, **changes)
    with pytest.raises(ValueError, match=match) as raised:
        upcycle(folder, tmp_path / "moe", experts=3, top_k=2, progress=False)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == [folder]
