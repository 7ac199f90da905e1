"""Block-FP8 weights: each is the number that its code and its block's factor stand for, rounded to bfloat16."""

import json
from pathlib import Path

import pytest
import torch
from hf_moe.conversion import import_checkpoint, upcycle
from hf_moe.conversion.files.block_fp8 import BlockFP8Checkpoint, block_size, dequantized
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conversion.conftest import DEEPSEEK_V3, build

RELEASED = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def codes_of(shape: tuple[int, int]) -> torch.Tensor:
    """Every code but the two NaNs."""
    codes = torch.randint(0, 254, shape, dtype=torch.uint8)
    return torch.where(codes >= 127, codes + 1, codes).view(torch.float8_e4m3fn)


def slowly(codes: torch.Tensor, scales: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Number by number from the bits of each code: sign, 4 of exponent, 3 of mantissa."""
    result = torch.empty(codes.shape, dtype=torch.bfloat16)
    for row, bits in enumerate(codes.view(torch.uint8).tolist()):
        for column, code in enumerate(bits):
            sign, exponent, mantissa = -1 if code >> 7 else 1, (code >> 3) & 15, code & 7
            value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
            scale = scales[row // block[0], column // block[1]].float()
            result[row, column] = (torch.tensor(sign * value) * scale).to(torch.bfloat16)
    return result


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "block"),
    [((131, 129), (128, 128)), ((7, 250), (128, 128)), ((23, 17), (5, 4)), ((8, 8), (4, 4)), ((3, 2), (1, 7))],
    ids=str,
)
def test_dequantized_is_exact(shape, block, scale_dtype):
    codes = codes_of(shape)
    scales = (torch.rand(-(-shape[0] // block[0]), -(-shape[1] // block[1])) * 1e-2).to(scale_dtype)
    result, expected = dequantized(codes, scales, block), slowly(codes, scales, block)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result.view(torch.int16), expected.view(torch.int16))


@pytest.fixture
def quantized(tmp_path) -> Path:
    """A V3 in bfloat16 whose projections are in blocks of 5 x 7, experts included."""
    model = build("deepseek_v3", torch.bfloat16, **{**DEEPSEEK_V3, "n_group": 1, "topk_group": 1})
    model.save_pretrained(tmp_path / "fp8")
    path = tmp_path / "fp8" / "model.safetensors"
    weights = load_file(path)
    for name in [name for name in weights if "_proj" in name]:
        shape = weights[name].shape
        weights[name] = codes_of(shape)
        weights[f"{name}_scale_inv"] = torch.rand(-(-shape[0] // 5), -(-shape[1] // 7)) * 1e-2
    save_file(weights, path, metadata={"format": "pt"})
    edit_config(tmp_path / "fp8", quantization_config=RELEASED | {"weight_block_size": [5, 7]})
    return tmp_path / "fp8"


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, edit) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_import_dequantizes(quantized, tmp_path):
    report = import_checkpoint(quantized, tmp_path / "moe", verify=False, progress=False)
    stored, written = (load_file(folder / "model.safetensors") for folder in (quantized, tmp_path / "moe"))
    assert report["dtype"] == "bfloat16"
    assert report["disk_bytes"] == (tmp_path / "moe" / "model.safetensors").stat().st_size

    def expected(name: str) -> torch.Tensor:
        scales = stored.get(f"{name}_scale_inv")
        return stored[name] if scales is None else slowly(stored[name], scales, (5, 7))

    for name, weight in written.items():
        if ".experts." not in name:
            assert torch.equal(weight, expected(name)), name
    for expert in range(6):
        mlp = "model.layers.2.mlp.experts."
        parts = [expected(f"{mlp}{expert}.{part}_proj.weight") for part in ("gate", "up")]
        assert torch.equal(written[f"{mlp}gate_up_proj"][expert], torch.cat(parts))
        assert torch.equal(written[f"{mlp}down_proj"][expert], expected(f"{mlp}{expert}.down_proj.weight"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert model.dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((tmp_path / "moe" / "config.json").read_text())


def test_factors_are_not_tensors_of_their_own(quantized):
    checkpoint = BlockFP8Checkpoint(quantized, (5, 7))
    assert not [name for name in checkpoint.entries if name.endswith("_scale_inv")]
    assert torch.float8_e4m3fn not in {entry.dtype for entry in checkpoint.entries.values()}


def drop_scale(weights):
    del weights[f"{DOWN}_scale_inv"]


def reshape_scale(weights):
    weights[f"{DOWN}_scale_inv"] = weights[f"{DOWN}_scale_inv"][1:].clone()


def integer_scale(weights):
    weights[f"{DOWN}_scale_inv"] = weights[f"{DOWN}_scale_inv"].to(torch.int32)


def scale_without_codes(weights):
    weights["model.norm.weight_scale_inv"] = torch.ones(1, 1)


def codes_of_a_norm(weights):
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float8_e4m3fn)


DOWN = "model.layers.0.mlp.down_proj.weight"
DAMAGE = {
    "no factors": (drop_scale, r"lacks .*down_proj\.weight_scale_inv"),
    "too few factors": (reshape_scale, r"down_proj\.weight_scale_inv .*\[4, 6\].* \[24, 36\].* \[5, 7\].* \[5, 6\]"),
    "factors that are integers": (integer_scale, r"down_proj\.weight_scale_inv is torch.int32"),
    "factors of nothing": (scale_without_codes, r"holds model\.norm\.weight_scale_inv"),
    "a vector": (codes_of_a_norm, r"model\.norm\.weight .*\[24\].*only matrices"),
}


@pytest.mark.parametrize(("damage", "match"), DAMAGE.values(), ids=DAMAGE)
def test_refuses_what_does_not_fit(damage, match, quantized, tmp_path):
    edit_weights(quantized, damage)
    with pytest.raises(ValueError, match=match) as raised:
        import_checkpoint(quantized, tmp_path / "moe", verify=False, progress=False)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == [quantized]


@pytest.mark.parametrize(
    ("quantization", "match"),
    [
        ({"quant_method": "awq", "bits": 4}, "quant_method='awq'; hf_moe"),
        (RELEASED | {"fmt": "e5m2"}, "fmt='e5m2'"),
        (RELEASED | {"weight_block_size": None}, "weight_block_size=None"),
        (RELEASED | {"weight_block_size": [128]}, r"weight_block_size=\[128\]"),
        (RELEASED | {"weight_block_size": [128, 0]}, r"weight_block_size=\[128, 0\]"),
        ({}, "quant_method=None"),
    ],
    ids=str,
)
def test_other_ways_to_quantize_are_refused_by_name(quantization, match, quantized, tmp_path):
    edit_config(quantized, quantization_config=quantization)
    with pytest.raises(ValueError, match=match):
        import_checkpoint(quantized, tmp_path / "moe", verify=False, progress=False)


def test_codes_without_a_config_are_refused(quantized, tmp_path):
    edit_config(quantized, quantization_config=None)
    with pytest.raises(ValueError, match=r"_scale_inv|float8_e4m3fn"):
        import_checkpoint(quantized, tmp_path / "moe", verify=False, progress=False)


def test_comparison_is_refused_before_anything_is_written(quantized, tmp_path):
    with pytest.raises(ValueError, match=r"block-FP8.*verify=False"):
        import_checkpoint(quantized, tmp_path / "moe", progress=False)
    assert list(tmp_path.iterdir()) == [quantized]


def test_released_block_size():
    assert block_size(RELEASED) == (128, 128)


def test_memory_stays_bounded(tmp_path):
    """A strip of rows at a time in float32: the result and little more."""
    codes = codes_of((4096, 64))
    scales = torch.rand(32, 1)
    with torch.profiler.profile(profile_memory=True) as profile:
        dequantized(codes, scales, (128, 128))
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest <= 2 * codes.numel()


def test_a_dense_model_in_blocks_is_upcycled(tmp_path):
    build("llama", torch.bfloat16).save_pretrained(tmp_path / "dense")
    scales = {"model.layers.1.mlp.down_proj.weight_scale_inv": torch.rand(5, 6)}
    codes = codes_of((24, 36))
    edit_weights(
        tmp_path / "dense",
        lambda weights: weights.update(scales | {"model.layers.1.mlp.down_proj.weight": codes}),
    )
    edit_config(tmp_path / "dense", quantization_config=RELEASED | {"weight_block_size": [5, 7]})
    upcycle(tmp_path / "dense", tmp_path / "moe", experts=3, top_k=1, verify=False, progress=False)
    written = load_file(tmp_path / "moe" / "model.safetensors")["model.layers.1.mlp.experts.down_proj"]
    expected = slowly(codes, *scales.values(), (5, 7))
    assert all(torch.equal(expert, expected) for expert in written)
