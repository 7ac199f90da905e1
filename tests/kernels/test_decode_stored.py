"""A decoding step that reads weights in 8 and 4 bits, against the modules with the values that the bits stand for."""

from collections import OrderedDict

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from hf_moe.training.weights.groups import matrices
from torch import nn
from transformers import AutoModelForCausalLM, TorchAoConfig

from hf_moe.kernels.decode import few_tokens, fused, products
from hf_moe.kernels.decode.stored import WHOLE, Weight, alike, halves_above_128, weight_of
from hf_moe.model.decoding import obstacles
from hf_moe.stored_weights import Fp8Weight, Int4Weight, in_full

from .steps import DEVICE, LATENT, model_of, steps_of

KINDS = {"fp8": (Fp8Weight, (8, 16)), "int4": (Int4Weight, (1, 64))}  # smaller blocks than users have


def store(model: nn.Module, kind: type, block: tuple[int, int]) -> None:
    for name in matrices(model):
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        stored = kind.quantize(module._parameters[attribute], block)
        setattr(module, attribute, nn.Parameter(stored, requires_grad=False))


MODELS = {
    "mla, q_lora, shared": LATENT
    | {"n_shared_experts": 2, "moe_intermediate_size": 64, "q_lora_rank": 20, "router_type": "sigmoid_topk"},
    "gqa, norm a head": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "qk_norm": "head"},
    "gqa, dense first, clamped, shared": {"num_attention_heads": 4, "mlp_layer_types": ["dense", "sparse"]}
    | {"num_hidden_layers": 2, "experts_swiglu_limit": 0.05, "n_shared_experts": 1},
    "plain MLP with biases": {"gated_mlp": False, "mlp_bias": True, "hidden_act": "gelu", "num_attention_heads": 4},
}
ONE = (1, 1)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_a_step_reads_what_is_stored(name, kind, rows, monkeypatch):
    model = model_of(MODELS[name], torch.float32)
    full, _ = steps_of(model, 3, rows, ONE)
    store(model, *KINDS[kind])
    dense = []  # whose values somebody has asked for within the kernels' step
    expected, actual = steps_of(model, 3, rows, ONE)
    bound = 5e-5 if kind == "int4" and DEVICE == "cuda" else 2e-5  # as in `test_products_with_what_is_stored`
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound * float(expected.abs().max()))
    assert (expected - full).abs().max() > 1e-3 * full.abs().max()  # it is another model than before
    with fused(model, rows):
        asked = Fp8Weight.values if kind == "fp8" else Int4Weight.values
        monkeypatch.setattr(KINDS[kind][0], "values", lambda self: dense.append(self) or asked(self))
        x = torch.randn(rows, 40, device=DEVICE)
        for layer in model.model.layers:
            assert "forward" in vars(layer.self_attn) and "forward" in vars(layer.mlp)
            layer.mlp(x[None])
    assert not dense


FORMS = {
    "fp8 in blocks": (lambda w: weight_of(Fp8Weight.quantize(w, (8, 32))), lambda w: Fp8Weight.quantize(w, (8, 32))),
    "fp8": (lambda w: weight_of(Fp8Weight.quantize(w)), Fp8Weight.quantize),
    "int4": (lambda w: weight_of(Int4Weight.quantize(w)), Int4Weight.quantize),
}


def a_row(weight: torch.Tensor) -> tuple[Weight, torch.Tensor]:
    """Float8 with one scale a row, as torchao has it."""
    scales = weight.abs().amax(-1, keepdim=True) / 448
    codes = (weight / scales).to(torch.float8_e4m3fn)
    read = Weight(codes.view(torch.uint8), scales, None, tuple(weight.shape), 1, (1, WHOLE))
    return read, codes.float() * scales


@pytest.mark.parametrize("depth", [45, 300])
@pytest.mark.parametrize("rows", [1, 2, 6])
@pytest.mark.parametrize("form", [*FORMS, "fp8, a row"])
def test_products_with_what_is_stored(form, rows, depth, monkeypatch):
    """Up to three matrices in one launch, of other numbers of columns; depths of one tile, and of more."""
    monkeypatch.setattr(few_tokens, "TILES", (64, 64, 64))
    torch.manual_seed(0)
    x, sizes = torch.randn(rows, depth, device=DEVICE), 1 + torch.arange(depth, device=DEVICE)
    weights = [torch.randn(columns, depth, device=DEVICE) * sizes for columns in (5, 17, 2)]
    if form == "fp8, a row":
        read, values = zip(*map(a_row, weights), strict=True)
    else:
        read, values = zip(*((FORMS[form][0](w), FORMS[form][1](w).values()) for w in weights), strict=True)
    assert alike(*read)
    # On tensor cores, codes of 4 bits have 128 added to them, and the sum of 128 times x taken off.
    bound = 3e-5 if form == "int4" and DEVICE == "cuda" else 1e-5
    for count in (1, 3):
        for found, value in zip(products.linear(x, *read[:count]), values, strict=False):
            expected = x.double() @ value.double().T
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("rows", [3, 6])
@pytest.mark.parametrize("form", FORMS)
def test_products_in_sixteen_bits(form, rows, dtype):
    if DEVICE == "cpu" and dtype == torch.bfloat16 and rows > few_tokens.MAX_TOKENS:
        pytest.skip("Triton's interpreter cannot multiply matrices of bfloat16")
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 141, device=DEVICE).to(dtype), torch.randn(19, 141, device=DEVICE).to(dtype)
    expected = x.double() @ in_full_precision(FORMS[form][1](weight)).T
    (found,) = products.linear(x, FORMS[form][0](weight))
    bound = torch.finfo(dtype).eps * expected.abs() + 1e-4  # of the sum's own rounding, and of what is summed
    assert ((found.double() - expected).abs() <= bound).all()


def in_full_precision(stored) -> torch.Tensor:
    """Its values before they are rounded to its dtype: what kernels compute with."""
    return type(stored)(stored.packed, stored.state._replace(dtype=torch.float32)).values().double()


@triton.jit
def halves_kernel(words_ptr, lower_ptr, upper_ptr, J: tl.constexpr):
    place = tl.arange(0, 16)
    lower, upper = halves_above_128(tl.load(words_ptr + place), J, lower_ptr.dtype.element_ty)
    tl.store(lower_ptr + place, lower)
    tl.store(upper_ptr + place, upper)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("j", range(4))
def test_codes_are_cut_from_words(j, dtype):
    torch.manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (16,), dtype=torch.int32, device=DEVICE)
    lower, upper = (torch.empty(16, dtype=dtype, device=DEVICE) for _ in range(2))
    halves_kernel[(1,)](words, lower, upper, J=j)
    for found, shift in ((lower, 4 * j), (upper, 16 + 4 * j)):
        assert found.tolist() == [128 + ((word >> shift) & 15) for word in words.tolist()]


def test_a_weight_that_no_launch_can_read_is_left_to_its_module():
    class Other(torch.Tensor):
        pass

    odd = torch.randn(4, 33)
    assert weight_of(Fp8Weight.quantize(odd, (1, 8))) is None  # a run of 16 bytes would lie in two blocks
    assert weight_of(odd.as_subclass(Other)) is None
    assert not alike(weight_of(odd), weight_of(Fp8Weight.quantize(odd)))
    assert torch.equal(in_full(odd), odd)


@pytest.mark.parametrize("name", ["gqa, norm a head", "mla, q_lora, shared"])
def test_float8_of_torchao_is_read_as_it_is_loaded(name, tmp_path):
    """Linear layers by its config alone, and by their names fused experts, too."""
    torchao = pytest.importorskip("torchao", reason="needs torchao: pip install 'hf_moe[float8]'")
    plain = model_of(MODELS[name], torch.float32)
    plain.save_pretrained(tmp_path)
    with_scales = torchao.quantization.Float8WeightOnlyConfig()
    patterns = [r"re:.*self_attn\.\w+_proj(_with_mqa)?", r"re:.*experts\.(\w+_proj|gate_up_proj)"]
    by_name = torchao.quantization.FqnToConfig(OrderedDict(dict.fromkeys(patterns, with_scales)))
    for config, fused_too in ((with_scales, False), (by_name, True)):
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=TorchAoConfig(config)).to(DEVICE)
        layer = model.model.layers[0]
        assert weight_of(layer.self_attn.o_proj.weight).form == 1
        assert (weight_of(layer.mlp.experts.down_proj).form == 1) == fused_too
        for said in obstacles(model):
            assert "quantised" not in said and "plain tensors" not in said
        for rows in (1, 5):
            expected, actual = steps_of(model, 3, rows, ONE)
            torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
