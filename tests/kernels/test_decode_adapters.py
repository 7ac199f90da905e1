"""A decoding step with adapters that are not merged, against PEFT's own forward."""

import pytest
import torch

pytest.importorskip("triton")

import peft
from torch import nn

from hf_moe.kernels.decode import fused
from hf_moe.model.decoding import HfMoeReservedCache, recording_key
from hf_moe.stored_weights import Fp8Weight, Int4Weight

from .steps import LATENT, model_of, steps_of
from .test_decode_stored import store
from .test_host_models import model_of as host_model
from .test_host_models import steps as host_steps

ONE = (1, 1)
MODELS = {
    "gqa, norm a head, shared": {"num_attention_heads": 4, "num_key_value_heads": 2, "qk_norm": "head"}
    | {"n_shared_experts": 2},
    "mla, q_lora": LATENT | {"q_lora_rank": 20, "num_experts_per_tok": 3},
    "plain MLP with biases": {"gated_mlp": False, "mlp_bias": True, "hidden_act": "gelu", "num_attention_heads": 4},
}
EXPERTS = ("gate_up_proj", "up_proj", "down_proj")


def adapted(model: nn.Module, linears: list[str], experts: tuple[str, ...] = EXPERTS, **fields):
    """PEFT's model of it with an adapter of random factors; one on each matrix of experts, too."""
    names = [name for name, x in model.named_parameters() if x.ndim == 3 and name.rpartition(".")[2] in experts]
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=linears, target_parameters=names, **fields)
    found = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for name, x in found.named_parameters():
        if "lora_" in name:
            nn.init.normal_(x, std=0.2)
    return found.eval()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


LINEARS = ["q_proj", "v_proj", "o_proj"]
LATENT_LINEARS = ["q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "o_proj"]


@pytest.mark.parametrize("rows", [1, 3, 5])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_adds_what_peft_adds(name, rows):
    model = model_of(MODELS[name], torch.float32)
    bare, _ = steps_of(model, 3, rows, ONE)
    adapted(model, LATENT_LINEARS if "mla" in name else LINEARS)
    expected, actual = steps_of(model, 3, rows, ONE)
    assert_close(actual, expected)
    assert (expected - bare).abs().max() > 1e-2 * bare.abs().max()
    with fused(model, rows):
        layer = model.model.layers[0]
        assert "forward" in vars(layer.mlp) and "forward" in vars(layer.self_attn)


@pytest.mark.parametrize("rows", [4, 7])
@pytest.mark.parametrize("experts", [("gate_up_proj",), ("down_proj",)], ids=str)
@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe"])
@torch.no_grad()
def test_a_step_of_transformers_own_adds_what_peft_adds(name, experts, rows):
    model = host_model(name, torch.float32)
    adapted(model, ["k_proj", "o_proj"], experts)
    actual, expected, changed = host_steps(model, 2, rows)
    assert_close(actual, expected)
    assert any(name.endswith("SparseMoeBlock") for name in changed)


@pytest.mark.parametrize(("kind", "block"), [(Fp8Weight, (8, 16)), (Int4Weight, (1, 64))], ids=["fp8", "int4"])
def test_an_adapter_beside_what_is_stored(kind, block):
    model = model_of(MODELS["gqa, norm a head, shared"], torch.float32)
    store(model, kind, block)
    adapted(model, LINEARS, ())
    expected, actual = steps_of(model, 3, 2, ONE)
    assert_close(actual, expected)


def two_of_them(model):
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])


CHANGES = {
    "off": lambda model: model.base_model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "two of them": two_of_them,
}


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("change", CHANGES)
def test_adapters_that_are_off_merged_or_several(change, rows):
    model = model_of(MODELS["gqa, norm a head, shared"], torch.float32)
    CHANGES[change](adapted(model, LINEARS))
    expected, actual = steps_of(model, 0, rows, ONE)
    assert_close(actual, expected)


@pytest.mark.parametrize("change", [*CHANGES, "one that is on"])
@torch.no_grad()
def test_a_prompt_with_adapters(change):
    model = model_of(MODELS["gqa, norm a head, shared"], torch.float32)
    wrapped = adapted(model, LINEARS)
    CHANGES.get(change, bool)(wrapped)
    ids = torch.randint(1, 37, (1, 70), device=model.device)
    expected = model(ids).logits
    with fused(model, 70):
        assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("fields", [{"use_dora": True}, {"lora_bias": True}, {"rank_pattern": {"v_proj": 2}}], ids=str)
def test_what_adds_more_than_two_products_of_one_rank_is_left_to_peft(fields):
    model = model_of(MODELS["gqa, norm a head, shared"], torch.float32)
    adapted(model, LINEARS, (), **fields)
    expected, actual = steps_of(model, 0, 1, ONE)
    assert_close(actual, expected)


def test_a_recording_is_known_by_what_its_adapters_add():
    model = model_of(MODELS["gqa, norm a head, shared"], torch.float32)
    wrapped, cache = adapted(model, LINEARS), HfMoeReservedCache(1, 8)
    model(torch.ones(1, 3, dtype=torch.long, device=model.device), past_key_values=cache)
    first = recording_key(model, cache)
    assert recording_key(model, cache) == first
    keys = [first]
    wrapped.base_model.disable_adapter_layers()
    keys.append(recording_key(model, cache))
    wrapped.base_model.enable_adapter_layers()
    assert recording_key(model, cache) == first
    model.model.layers[0].self_attn.q_proj.scaling["default"] *= 2
    keys.append(recording_key(model, cache))
    wrapped.merge_adapter()
    keys.append(recording_key(model, cache))
    assert all(a != b for place, a in enumerate(keys) for b in keys[:place])
