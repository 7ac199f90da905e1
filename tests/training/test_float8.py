"""Float8: frozen weights stored in blocks of it under an adapter, and linear layers that multiply in it."""

from importlib.util import find_spec

import pytest
import torch
from hf_moe.conversion.files.block_fp8 import dequantized
from hf_moe.training.weights.adapters import AdapterArguments, add_adapter, check_adapter_arguments
from hf_moe.training.weights.float8 import check_float8, compute_in_float8
from hf_moe.training.weights.groups import matrices
from hf_moe.training.weights.merging import merge_adapter
from hf_moe.training.weights.quantized import quantize

from hf_moe.stored_weights import FORMS, Fp8Weight

from .models import hf_moe, olmoe

CPU = torch.device("cpu")
SHAPES = [(2, 200, 300), (128, 256), (5, 7), (1, 130, 1)]


def release(shape: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales as a checkpoint holds them: in each block some number has the largest code."""
    generator = torch.Generator().manual_seed(0)
    codes = (torch.randn(shape, generator=generator) * 60).to(torch.float8_e4m3fn)
    codes = codes.float()
    codes[..., ::128, ::128] = 448.0
    grid = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    return codes.to(torch.float8_e4m3fn), torch.rand(grid, generator=generator) * 1e-3 + 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_released_weight_gets_its_codes_again(shape, dtype):
    """From what `hf-moe import` makes of them; the scales to bfloat16's rounding of the largest number."""
    codes, scales = release(shape)
    pairs = zip(codes.reshape(-1, *shape[-2:]), scales.reshape(-1, *scales.shape[-2:]), strict=True)
    weight = torch.stack([dequantized(*pair, (128, 128)) for pair in pairs]).view(shape).to(dtype)
    stored = Fp8Weight.quantize(weight)
    assert torch.equal(stored.packed.float(), codes.float())
    assert (stored.state.scales / scales - 1).abs().max() < 2**-8
    assert stored.dtype == dtype and stored.shape == weight.shape
    assert stored.bytes == weight.numel() + 4 * scales.numel()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_are_within_half_a_step(shape):
    weight = torch.randn(shape)
    weight[..., :1, :] = 0
    error = (Fp8Weight.quantize(weight).values() - weight).abs()
    # Three bits of mantissa; below 2^-6 of the scale the steps are 2^-9 of it, and a scale is the largest / 448.
    assert (error <= (weight.abs() / 16).clamp_min(weight.abs().amax() / 448 * 2**-10) * 1.001).all()
    assert not Fp8Weight.quantize(torch.zeros(3, 3)).values().any()


@pytest.mark.parametrize("make", [lambda: hf_moe(n_shared_experts=1), olmoe], ids=["hf_moe", "olmoe"])
@pytest.mark.parametrize("stored", FORMS)
def test_adapter_trains_beside_codes_as_beside_their_values_and_merges(make, stored):
    model, plain = make(), make()
    targets = matrices(model)
    said = quantize(model, targets, CPU, stored)
    assert said.startswith(f"{stored} for 8 matrices of attention") and "routed_experts" in said
    assert all(isinstance(model.get_parameter(name), FORMS[stored]) for name in targets)
    weights = {name: x.values() if isinstance(x, FORMS[stored]) else x for name, x in model.state_dict().items()}
    plain.load_state_dict(weights)
    ids, results, batch = torch.arange(3, 33).view(2, 15), [], []
    for x in (model, plain):
        adapted, _ = add_adapter(x, AdapterArguments(lora_parts=["attention", "routed_experts"], lora_r=3))
        torch.manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        logits = adapted(ids).logits
        logits.square().mean().backward()
        batch.append(adapted)
        results.append([logits, *(x.grad for x in adapted.parameters() if x.requires_grad)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
    merged, _ = merge_adapter(batch[0], torch.float32, [{"input_ids": ids}])
    torch.testing.assert_close(merged(ids).logits, results[0][0], rtol=1e-4, atol=1e-4)


def test_unknown_storage_is_refused():
    with pytest.raises(ValueError, match="lora_base is 'int3'; it can be nf4, fp8, int4"):
        check_adapter_arguments(AdapterArguments(lora_parts=["attention"], lora_base="int3"), "all")


needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao: pip install 'hf_moe[float8]'")


@needs_torchao
def test_linear_layers_multiply_in_float8():
    """Emulated: each operand of a product is rounded to float8 with one scale; nothing else differs."""
    model = hf_moe(n_shared_experts=1, hidden_size=32, moe_intermediate_size=16)
    plain, names = hf_moe(n_shared_experts=1, hidden_size=32, moe_intermediate_size=16), []
    said = compute_in_float8(model, emulate=True)
    assert said.startswith("float8 products in ") and model.state_dict().keys() == plain.state_dict().keys()

    def rounded(x, dtype=torch.float8_e4m3fn):
        scale = torch.finfo(dtype).max / x.abs().max()
        return (x * scale).to(dtype).float() / scale

    inputs = torch.randn(7, 32)
    for name, layer in plain.named_modules():
        if isinstance(layer, torch.nn.Linear):
            swapped = model.get_submodule(name)
            if type(swapped) is torch.nn.Linear:
                assert name == "lm_head" or layer.weight.shape[0] % 16
            elif layer.in_features == 32:
                names.append(name)
                x, y = (inputs.clone().requires_grad_() for _ in range(2))
                out = swapped(x)
                torch.testing.assert_close(out, rounded(y) @ rounded(layer.weight).T, rtol=1e-2, atol=1e-2)
                out.square().sum().backward()
                expected = rounded(2 * out.detach(), torch.float8_e5m2) @ rounded(layer.weight)
                torch.testing.assert_close(x.grad, expected, rtol=1e-2, atol=1e-2)
    assert any("shared_experts" in name for name in names) and any("q_proj" in name for name in names)


def test_float8_needs_the_package_and_the_card(monkeypatch):
    monkeypatch.setattr("hf_moe.training.weights.float8.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"float8 is true, which needs torchao: pip install 'hf_moe\[float8\]'"):
        check_float8(CPU)
    monkeypatch.setattr("hf_moe.training.weights.float8.find_spec", lambda name: name)
    with pytest.raises(ValueError, match=r"needs a GPU of compute capability 8\.9 or more, and this is a CPU"):
        check_float8(CPU)
