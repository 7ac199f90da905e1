"""How alike experts are, what leaving one out does, and how much of a routing two checkpoints share."""

import copy
import math

import pytest
import torch

from hf_moe.routers import captured, find_routers
from hf_moe.telemetry.experts import duplicates, expert_inputs, expert_tensors, output_similarity, weight_similarity
from hf_moe.telemetry.pruning import plan, prune, token_losses, without_expert
from hf_moe.telemetry.saturation import saturation
from hf_moe.telemetry.texts import padded
from hf_moe.telemetry.tracing import Run

from ..conversion.conftest import build, dbrx
from ..training.models import hf_moe as any_hf_moe
from ..training.models import olmoe
from .conftest import FIELDS, MODELS

BATCH = padded([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14], [15, 16, 17, 18, 19]])
TOKENS = BATCH.mask.bool()


def built(name, **changes):
    return MODELS[name](**changes).eval()


def routed(model):
    with captured(find_routers(model), 2) as routings, torch.no_grad():
        logits = model(input_ids=BATCH.ids, attention_mask=BATCH.mask, use_cache=False).logits
    return {name: x.index_SK[TOKENS.flatten()] for name, x in routings.items()}, logits


@pytest.mark.parametrize("name", MODELS)
def test_a_closed_expert_is_not_chosen_and_nothing_else_changes(name):
    model = built(name)
    routers, (before, logits) = find_routers(model), routed(model)
    first = next(iter(before))  # its inputs do not depend on any router
    for expert in range(6):
        with without_expert(routers[first], expert, 6) as closed:
            now = routed(model)[0][first]
        assert closed()
        assert not (now == expert).any()
        free = (before[first] != expert).all(dim=-1)
        if name != "deepseek_v3":  # there a closed expert may change which groups are best
            assert torch.equal(now[free].sort(-1).values, before[first][free].sort(-1).values)
        for row, old in zip(now[~free].tolist(), before[first][~free].tolist(), strict=True):
            assert len(set(row)) == 2
            if name != "deepseek_v3":
                assert set(old) - {expert} <= set(row)
    assert torch.equal(routed(model)[1], logits)  # all is as it was


def test_the_cost_of_an_expert_equals_that_of_a_router_written_anew():
    """OLMoE's router with one expert's probability 0 and all else as in the paper."""
    model, closed = built("olmoe"), 3
    routers = find_routers(model)
    name = list(routers)[1]

    def forward(hidden_states):
        logits = hidden_states.flatten(0, -2) @ model.get_submodule(name).weight.T
        keep = [i for i in range(6) if i != closed]
        open_logits = logits[:, keep]
        best = open_logits.softmax(-1).topk(2, dim=-1)
        return logits, best.values, torch.tensor(keep)[best.indices]

    other = copy.deepcopy(model)
    other.get_submodule(name).forward = forward
    with torch.no_grad():
        losses = [
            token_losses(m(**{"input_ids": BATCH.ids, "attention_mask": BATCH.mask}).logits, BATCH)
            for m in (model, other)
        ]
    change = (losses[1] - losses[0]).double()
    costs = prune(model, routers, dict.fromkeys(routers, 6), [(name, closed)], [BATCH], lambda tokens: None)
    assert costs[name, closed].mean == pytest.approx(change.mean().item(), abs=1e-6) and change.abs().max() > 1e-3
    assert costs[name, closed].error == pytest.approx(change.std().item() / math.sqrt(12), abs=1e-6)


def test_experts_that_are_copies_cost_nothing_and_are_found():
    model = built("hf_moe", router_type="topk_softmax")
    with torch.no_grad():
        for layer in model.model.layers:
            for p in layer.mlp.experts.parameters():
                p.copy_(p[:1].expand_as(p))
    routers = find_routers(model)
    costs = prune(
        model, routers, dict.fromkeys(routers, 6), [(name, 2) for name in routers], [BATCH], lambda tokens: None
    )
    assert len(costs) == 2 and all(abs(cost.mean) < 1e-5 for cost in costs.values())
    for name in routers:
        weights = weight_similarity(expert_tensors(model, name, 6))
        outputs = output_similarity(
            model.get_submodule(name.removesuffix(".gate")).experts, expert_inputs(model, routers, BATCH)[name], 6
        )
        assert duplicates((weights, outputs)) == [[0, 1, 2, 3, 4, 5]]


def test_a_hash_router_has_no_logits_to_close():
    model = any_hf_moe(router_type="hash", vocab_size=61).eval()
    routers = find_routers(model)
    name = next(iter(routers))
    assert prune(model, routers, {name: 6}, [(name, 1)], [BATCH], lambda tokens: None) == {}


def test_similarities_equal_slow_ones():
    model = built("olmoe")
    layer = model.model.layers[1].mlp
    with torch.no_grad():
        layer.experts.down_proj[4] = layer.experts.down_proj[1] * 0.5
        layer.experts.gate_up_proj[4] = layer.experts.gate_up_proj[1]
    name = "model.layers.1.mlp.gate"
    weights = weight_similarity(expert_tensors(model, name, 6))
    flat = [torch.cat([p[i].flatten() for p in layer.experts.parameters()]).double() for i in range(6)]
    hidden = expert_inputs(model, find_routers(model), BATCH)[name]
    outputs = output_similarity(layer.experts, hidden, 6)
    assert len(hidden) == 7

    def feed_forward(x, i):
        gate, up = (layer.experts.gate_up_proj[i] @ x).chunk(2)
        return (layer.experts.down_proj[i] @ (torch.nn.functional.silu(gate) * up)).double()

    for i in range(6):
        for j in range(6):
            assert weights[i, j].item() == pytest.approx((flat[i] @ flat[j] / flat[i].norm() / flat[j].norm()).item())
            pairs = [(feed_forward(x, i), feed_forward(x, j)) for x in hidden]
            cosines = [(a @ b / a.norm() / b.norm()).item() for a, b in pairs]
            assert outputs[i, j].item() == pytest.approx(sum(cosines) / 7, abs=1e-5)
    assert (
        duplicates((weights, outputs)) == [] and duplicates((None, outputs)) == [[1, 4]] and duplicates((None,)) == []
    )


def test_saturation_equals_a_slow_count():
    model, other = built("olmoe"), built("olmoe", seed=3)
    mine, theirs = routed(model)[0], routed(other)[0]
    shares = saturation(model, other, 2, [BATCH], lambda tokens: None)
    for name, share in shares.items():
        rows = zip(mine[name].tolist(), theirs[name].tolist(), strict=True)
        assert share == pytest.approx(sum(len(set(a) & set(b)) / 2 for a, b in rows) / 15)
        assert 0 < share < 1
    assert set(saturation(model, model, 2, [BATCH], lambda tokens: None).values()) == {1.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"num_experts": 5}, "2 of 6 experts, the other's 2 of 5"), ({"vocab_size": 31}, r"knows 31 tokens, not \d+")],
    ids=["experts", "vocabulary"],
)
def test_saturation_needs_the_same_choice(changes, said):
    with pytest.raises(ValueError, match=said):
        saturation(built("olmoe"), olmoe(**FIELDS | changes).eval(), 2, [BATCH], lambda tokens: None)


def test_a_dbrx_says_how_many_experts_a_token_has_one_level_below(tokenizer):
    model = build("dbrx", **dbrx(clip_qkv=8.0) | {"vocab_size": 512})
    run = Run(model, tokenizer, "dbrx", {}, None, progress=False)
    with captured(run.routers, run.top_k) as routings:
        model(BATCH.ids)
    assert {routing.index_SK.shape[-1] for routing in routings.values()} == {3}


def test_a_bias_of_two_axes_is_closed_and_given_back():
    sizes = {"num_hidden_layers": 2, "moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 12}
    model = build("ernie4_5_moe", **sizes)
    router = find_routers(model)["model.layers.1.mlp.gate"]
    before = router.bias.data.normal_().clone()
    assert before.shape == (1, 6)
    with torch.no_grad(), without_expert(router, 4, 6):
        assert router.bias.argmin() == 4
    assert torch.equal(router.bias, before)


@pytest.mark.parametrize(
    ("budget", "tokens", "tried"),
    [
        (128 * 5, 128, [("a", 2), ("b", 0), ("a", 0), ("b", 1), ("a", 1)]),
        (500 * 5, 500, 5),
        (10**6, 2048, 5),
        (128 * 3, 128, 3),
    ],
)
def test_a_budget_goes_to_the_idlest_experts_first(budget, tokens, tried):
    chosen = {"a": torch.tensor([4, 9, 1]), "b": torch.tensor([2, 3])}
    planned = plan(budget, chosen)
    assert planned[0] == tokens
    assert planned[1] == tried if isinstance(tried, list) else len(planned[1]) == tried
    assert plan(100, chosen)[1] == []
