"""MXFP4 weights: each is the number that its four bits and its block's exponent stand for."""

import json
from pathlib import Path

import pytest
import torch
from hf_moe.conversion import import_checkpoint
from hf_moe.conversion.files.mxfp4 import MXFP4Checkpoint, dequantized
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import tokens
from tests.conversion.conftest import GPT_OSS, build

RELEASED = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}


def slowly(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Number by number from its bits: sign, two of exponent, one of mantissa; the low half of a byte comes first."""
    numbers = []
    for row, exponents in zip(blocks.tolist(), scales.tolist(), strict=True):
        for group, shared in zip(row, exponents, strict=True):
            for byte in group:
                for code in (byte % 16, byte // 16):
                    sign, exponent, mantissa = code // 8, code // 2 % 4, code % 2
                    value = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
                    power = float("nan") if shared == 255 else 2.0 ** (shared - 127)
                    numbers.append((-1) ** sign * value * power)
    return torch.tensor(numbers, dtype=torch.float64).view(len(blocks), -1).bfloat16()


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (7, 3), (65, 2)])
def test_dequantized_is_exact(rows, groups):
    blocks = torch.randint(0, 256, (rows, groups, 16), dtype=torch.uint8)
    blocks[0, 0] = torch.arange(0, 256, 16, dtype=torch.uint8) + torch.arange(16, dtype=torch.uint8)  # every code
    scales = torch.randint(100, 140, (rows, groups), dtype=torch.uint8)
    result, expected = dequantized(blocks, scales), slowly(blocks, scales)
    assert result.shape == (rows, 32 * groups)
    assert torch.equal(result.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("scale", [0, 1, 252, 255])
def test_exponents_at_the_ends(scale):
    blocks = torch.randint(0, 256, (3, 1, 16), dtype=torch.uint8)
    scales = torch.full((3, 1), scale, dtype=torch.uint8)
    torch.testing.assert_close(dequantized(blocks, scales), slowly(blocks, scales), rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def quantized(tmp_path) -> Path:
    """A gpt-oss in bfloat16 whose experts are in MXFP4, as released."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "initializer_range": 0.1}
    build("gpt_oss", torch.bfloat16, **{**GPT_OSS, **sizes}).save_pretrained(tmp_path / "mxfp4")
    path = tmp_path / "mxfp4" / "model.safetensors"
    weights = load_file(path)
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = weights.pop(name).shape
        weights[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        weights[f"{name}_scales"] = torch.randint(119, 122, (experts, rows, columns // 32), dtype=torch.uint8)
    save_file(weights, path, metadata={"format": "pt"})
    config = tmp_path / "mxfp4" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": RELEASED}))
    return tmp_path / "mxfp4"


def test_import_dequantizes(quantized, tmp_path):
    """Gate rows and up rows alternate in the release and lie one after the other in hf_moe; the logits are equal."""
    report = import_checkpoint(quantized, tmp_path / "moe", max_shard_size="20KB", verify=False, progress=False)
    assert report["dtype"] == "bfloat16"
    stored = load_file(quantized / "model.safetensors")
    written = {}
    for file in (tmp_path / "moe").glob("*.safetensors"):
        written |= load_file(file)
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.experts."
        for expert in range(5):
            gate_up, down = (
                slowly(stored[f"{name}{part}_blocks"][expert], stored[f"{name}{part}_scales"][expert])
                for part in ("gate_up_proj", "down_proj")
            )
            assert torch.equal(written[f"{name}gate_up_proj"][expert], torch.cat((gate_up[0::2], gate_up[1::2])))
            assert torch.equal(written[f"{name}down_proj"][expert], down)
    assert "quantization_config" not in json.loads((tmp_path / "moe" / "config.json").read_text())
    theirs, ours = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).float().eval()
        for folder in (quantized, tmp_path / "moe")
    )
    ids = tokens(length=23, vocab_size=61)
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)


def test_import_compares_the_logits(quantized, tmp_path):
    assert import_checkpoint(quantized, tmp_path / "moe", progress=False)["max_abs_diff"] <= 1e-4


def test_one_expert_at_a_time(quantized):
    checkpoint = MXFP4Checkpoint(quantized)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert checkpoint.entries[name].shape == (5, 64, 64)
    assert torch.equal(checkpoint.part(name, 3, 5)[0], checkpoint.tensor(name)[3])
    assert not [name for name in checkpoint.entries if name.endswith(("_blocks", "_scales"))]


DOWN = "model.layers.0.mlp.experts.down_proj"
DAMAGE = {
    "no scales": (lambda weights: weights.pop(f"{DOWN}_scales"), r"lacks .*down_proj_scales"),
    "too few scales": (
        lambda weights: weights.update({f"{DOWN}_scales": weights[f"{DOWN}_scales"][1:].clone()}),
        r"down_proj_blocks .*\[5, 64, 1, 16\].*\[4, 64, 1\]",
    ),
    "scales that are floats": (
        lambda weights: weights.update({f"{DOWN}_scales": weights[f"{DOWN}_scales"].float()}),
        r"scales are torch\.float32",
    ),
    "twice": (lambda weights: weights.update({DOWN: torch.ones(5, 32, 64)}), r"down_proj twice"),
    "scales of nothing": (
        lambda weights: weights.update({"model.norm.weight_scales": torch.ones(1, dtype=torch.uint8)}),
        r"holds model\.norm\.weight_scales",
    ),
    "another size": (
        lambda weights: weights.update(
            {f"{DOWN}_{x}": weights[f"{DOWN}_{x}"][:, 1:].clone() for x in ("blocks", "scales")}
        ),
        r"down_proj has shape \[5, 32, 63\].*\[5, 32, 64\]",
    ),
}


@pytest.mark.parametrize(("damage", "match"), DAMAGE.values(), ids=DAMAGE)
def test_refuses_what_does_not_fit(damage, match, quantized, tmp_path):
    weights = load_file(quantized / "model.safetensors")
    damage(weights)
    save_file(weights, quantized / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=match) as raised:
        import_checkpoint(quantized, tmp_path / "moe", verify=False, progress=False)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == [quantized]
