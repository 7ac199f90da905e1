"""Models whose matrices are read in 8 and 4 bits: what is stored, and what computes with it."""

import copy
import math

import pytest
import torch
from hf_moe.training.weights.groups import matrices
from hf_moe.training.weights.quantized import quantize
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from transformers import AutoModelForCausalLM

import hf_moe
from hf_moe.model.decoding import obstacles, recording_key, reserve_cache
from hf_moe.reading import is_finite
from hf_moe.stored_weights import FORMS, Int4Weight, StoredWeight
from tests.training.models import deepseek_v3, mixtral, olmoe
from tests.training.models import hf_moe as tiny

FAMILIES = {"hf_moe": tiny, "olmoe": olmoe, "mixtral": mixtral, "deepseek_v3": deepseek_v3}
IDS = torch.arange(2, 9).unsqueeze(0)


def int4_by_hand(row: list[float], size: int) -> list[float]:
    """The values of one row, number by number, in groups of `size`."""
    values = []
    for start in range(0, len(row), size):
        group = row[start : start + size]
        low = torch.tensor(min(group)).bfloat16().item()
        scale = torch.tensor((max(group) - low) / 15).bfloat16().item()
        for x in group:
            code = 0 if scale == 0 else min(15, max(0, round((x - low) / scale)))
            values.append(code * scale + low)
    return values


@pytest.mark.parametrize("shape", [(3, 131), (2, 5, 256), (1, 2)], ids=str)
def test_int4_keeps_the_least_and_the_largest_of_each_group(shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight[..., 0, :] = 0.0
    stored = Int4Weight.quantize(weight)
    expected = torch.tensor([int4_by_hand(row, 128) for row in weight.flatten(0, -2).tolist()]).view(shape)
    torch.testing.assert_close(stored.values(), expected, rtol=1e-6, atol=1e-6)
    assert stored.dtype == torch.float32 and stored.shape == weight.shape and not stored.values()[..., 0, :].any()
    groups = weight[..., 0].numel() * math.ceil(shape[-1] / 128)
    whole = math.ceil(shape[-1] / 32) * 32
    assert stored.bytes == weight[..., 0].numel() * whole // 2 + 4 * groups


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(3, 128, 256), (5, 131), (6, 35), (12, 40)], ids=str)
@pytest.mark.parametrize(("stored", "blocks"), [("fp8", [(128, 128), (3, 5)]), ("int4", [(1, 128), (3, 5)])], ids=str)
def test_values_are_rounded_once(stored, blocks, shape, dtype):
    """Code times scale, and plus low, each in float32, whether blocks fill the weight or not."""
    torch.manual_seed(0)
    weight = (torch.randn(shape) * torch.rand(*shape[:-1], 1)).to(dtype)
    for rows, columns in blocks:
        kept = FORMS[stored].quantize(weight, (rows, columns))
        row, column = torch.arange(shape[-2]) // rows, torch.arange(shape[-1]) // columns
        expected = kept.codes() * kept.scales.float()[..., row, :][..., column]
        if kept.lows is not None:
            expected = expected + kept.lows.float()[..., row, :][..., column]
        values = kept.values()
        assert torch.equal(values, expected.to(dtype)) and values.is_contiguous() and values.dtype == dtype
        step = kept.scales.float().max() * (1 if stored == "int4" else 32)  # between neighbours
        assert (values.float() - weight.float()).abs().max() <= 0.51 * step + 0.01 * weight.float().abs().max()


@pytest.mark.parametrize("stored", FORMS)
def test_values_take_no_more_memory_than_they_are(stored):
    kept = FORMS[stored].quantize(torch.randn(2, 256, 384).bfloat16())
    made = []

    class Tensors(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made.append(func(*args, **(kwargs or {})))
            return made[-1]

    with Tensors():
        kept.values()
    assert len({x.untyped_storage().data_ptr() for x in made if x.numel() >= kept.numel() // 2} - parts_of(kept)) == 1
    assert not any(x.dtype == torch.float32 and x.numel() >= kept.numel() for x in made)


def parts_of(kept: StoredWeight) -> set[int]:
    return {part.untyped_storage().data_ptr() for part in (kept.packed, kept.scales)}


@pytest.mark.parametrize("stored", FORMS)
def test_what_is_stored_computes_in_inference_mode(stored):
    model = tiny()
    quantize(model, matrices(model), None, stored)
    with torch.no_grad():
        expected = model(IDS).logits
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, expected)


@pytest.mark.parametrize("stored", FORMS)
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_numbers_that_are_none_are_found_by_the_scales(stored, number, monkeypatch):
    weight = torch.randn(3, 256)
    kind = FORMS[stored]
    monkeypatch.setattr(kind, "values", lambda self: pytest.fail("a layer's values take their time"))
    assert is_finite(kind.quantize(weight))
    weight[1, 130] = number
    assert not is_finite(kind.quantize(weight))


@pytest.mark.parametrize("stored", FORMS)
def test_a_module_takes_its_codes_along(stored):
    linear = torch.nn.Linear(256, 128, bias=False)
    linear.weight = torch.nn.Parameter(FORMS[stored].quantize(linear.weight.data), requires_grad=False)
    assert is_traceable_wrapper_subclass(linear.weight)  # else `data` alone would be set, from one device to another
    weight = copy.deepcopy(linear).weight
    assert torch.equal(weight.values(), linear.weight.values()) and weight.packed is not linear.weight.packed
    linear.to("meta")
    parts = [getattr(linear.weight, name) for name in linear.weight.__tensor_flatten__()[0]]
    assert all(part.is_meta for part in parts) and type(linear.weight) is FORMS[stored]


@pytest.mark.parametrize("stored", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_matrix_is_stored_and_computes_as_its_values(family, stored, tmp_path):
    plain = FAMILIES[family]()
    plain.save_pretrained(tmp_path)
    config = hf_moe.StoredWeightsConfig(stored)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    named = {name for name, x in model.named_parameters() if isinstance(x, StoredWeight)}
    assert named == set(matrices(plain)) and any(".experts." in name for name in named)
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            kept = model.get_parameter(name)
            if name in named:
                weight.copy_(FORMS[stored].quantize(weight).values())
                assert torch.equal(kept.values(), weight)
                assert kept.bytes < weight.nbytes
            else:
                assert torch.equal(kept, weight)
        torch.testing.assert_close(model(IDS).logits, plain.eval()(IDS).logits, rtol=0, atol=1e-5)


def test_what_is_stored_can_be_recorded_and_is_known_by_its_codes(tmp_path):
    tiny().save_pretrained(tmp_path)
    load = AutoModelForCausalLM.from_pretrained
    model = load(tmp_path, quantization_config=hf_moe.StoredWeightsConfig("int4")).eval()
    said = list(obstacles(model))
    assert len(said) == 1 and "not on a GPU" in said[0], said
    cache = reserve_cache(model, 1, 8)
    model(IDS, past_key_values=cache)
    weight = model.model.layers[0].self_attn.q_proj.weight
    pointers = {pointer for pointer, _ in recording_key(model, cache)[0]}
    assert {weight.packed.data_ptr(), weight.scales.data_ptr(), weight.lows.data_ptr()} <= pointers


def test_what_cannot_be_stored_is_said_and_codes_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="stored is 'int3'; it can be fp8 or int4"):
        hf_moe.StoredWeightsConfig("int3")
    with pytest.raises(ValueError, match="does not know bits: it takes stored"):
        hf_moe.StoredWeightsConfig("int4", bits=4)
    tiny().save_pretrained(tmp_path / "plain")
    config = hf_moe.StoredWeightsConfig("fp8")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=config)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "saved")
