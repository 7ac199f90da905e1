"""Merging adds in float32 and rounds once; the routes that it changes are counted."""

import copy

import pytest
import torch
from hf_moe.training.stages.trained import advice
from hf_moe.training.weights.adapters import adapted_weights, add_adapter
from hf_moe.training.weights.merging import Changes, choices, merge_adapter

from ..conversion.conftest import build, dbrx
from .models import collate, deepseek_v3, hf_moe_biased, mixtral, rows
from .test_adapters import arguments

MODELS = {"hf_moe": hf_moe_biased, "deepseek_v3": deepseek_v3, "mixtral": mixtral}


def with_adapter(model):
    adapted, _ = add_adapter(model, arguments("attention", "routed_experts"))
    torch.manual_seed(5)
    for name, x in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(x, std=0.1)
    return adapted.eval()


def exact_delta(layer) -> torch.Tensor:
    """scaling B A in float64, expert by expert, from PEFT's layout: A is [E r, in], B is [out, r E], E innermost."""
    a, b = (x["default"].weight.detach().double() for x in (layer.lora_A, layer.lora_B))
    experts = getattr(layer, "num_experts", 1)
    a, b = a.view(experts, -1, a.shape[1]), b.view(len(b), -1, experts)
    delta = torch.stack([b[:, :, e] @ a[e] for e in range(experts)]) * layer.scaling["default"]
    return delta if experts > 1 else delta[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_merged_weight_is_the_exact_sum_rounded_once(name, dtype):
    model = MODELS[name]().to(dtype)
    before = {key: x.double() for key, x in model.state_dict().items()}
    adapted = with_adapter(model)
    exact = {key: before[key] + exact_delta(layer) for key, layer in adapted_weights(adapted).items()}
    twice = copy.deepcopy(adapted).merge_and_unload().state_dict()  # PEFT's own way
    merged, changes = merge_adapter(adapted, dtype, [collate(rows(4))])
    state = merged.state_dict()
    assert changes.all_routes == 2 * changes.all_tokens == 2 * sum(len(row["input_ids"]) for row in rows(4))
    for key, value in exact.items():
        assert state[key].dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(state[key].double(), value, rtol=1e-6, atol=1e-6)
        else:  # float32 sums round to another bfloat16 than exact ones in a few ties
            wrong = (state[key] != value.to(dtype)).float().mean()
            assert wrong < 2e-3
            if value.dim() == 3:
                assert (twice[key] != value.to(dtype)).float().mean() > 2e-2
    for key, value in before.items():
        if key not in exact:
            assert torch.equal(state[key].double(), value), key
        if key.endswith("e_score_correction_bias"):
            assert state[key].dtype == torch.float32


@pytest.mark.parametrize("name", MODELS)
def test_routes_are_counted(name):
    """None change in float32; rounding to bfloat16 changes those that a slow comparison finds."""
    batches = [collate(rows(6, seed=seed)) for seed in (1, 2)]
    merged, changes = merge_adapter(with_adapter(MODELS[name]()), torch.float32, batches)
    assert changes.routes == changes.tokens == 0 and changes.all_routes == choices(merged, batches)[0][..., 0].numel()
    adapted = with_adapter(MODELS[name]())
    before, said = choices(adapted, batches)
    merged, changes = merge_adapter(adapted, torch.bfloat16, batches)
    after, said_after = choices(merged, batches)
    different = sum(
        set(a) != set(b)
        for router in zip(before.tolist(), after.tolist(), strict=True)
        for a, b in zip(*router, strict=True)
    )
    assert changes.routes == different > 0
    assert changes.tokens == (said != said_after).sum() and len(said) == changes.all_tokens


@pytest.mark.parametrize(
    ("tokens", "dtype", "said"),
    [
        (0, "bfloat16", ": it writes what the adapter does"),
        (9, "bfloat16", ": ties, which rounding decides"),
        (11, "bfloat16", ": --lora_merge float32 changes fewer"),
        (11, "float32", ""),
    ],
)
def test_what_changed_routes_mean(tokens, dtype, said):
    changes = Changes(731, 46080, tokens, 1000)
    assert advice(changes, dtype) == said
    assert str(changes).startswith("731 of 46,080 routes (1.59%) and ") and f" {tokens} of 1,000 likeliest" in str(
        changes
    )


def test_padding_is_no_route():
    model = with_adapter(hf_moe_biased())
    batch = collate(rows(4))
    lengths = batch["attention_mask"].sum().item()
    assert choices(model, [batch, batch])[0].shape == (2, 2 * lengths, 2)


def test_every_choice_of_a_dbrx_is_counted():
    model, batch = build("dbrx", **dbrx(clip_qkv=8.0)), collate(rows(4))
    assert choices(model, [batch])[0].shape == (3, batch["attention_mask"].sum(), 3)
