"""Every mixture of experts in the installed Transformers: its routers are found, and what is read of them is what its
layers do."""

import pytest
import torch
from hf_moe.training.balance.counts import Balance
from hf_moe.training.balance.metrics import DROPPED, rows, split
from hf_moe.training.balance.moe_arguments import MoeTrainingArguments
from hf_moe.training.balance.selection_bias import SelectionBias

from hf_moe.model.balancing import expert_loss, routed, statistics
from hf_moe.routers import captured, find_routers, routed_experts
from hf_moe.routers.probe import KNOWN
from hf_moe.telemetry.counts import RouterCounts

from .families import EXPERTS, FAMILIES, LEFT_OUT, TOP_K, tiny

# Slow formulas of their papers, for those whose scores no call of their experts shows.
SCORES = {
    "jetmoe": lambda row: row.exp() / row.exp().sum(),
    "llama4_text": lambda row: 1 / (1 + (-row).exp()),
    "phimoe": lambda row: row.exp() / row.exp().sum(),
    "gemma4_text": lambda row: row,  # recorded as probabilities
}


def ids(model, rows: int = 2, length: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, 100, (rows, length), generator=generator)


def calls_of_experts(model, routers) -> dict[str, list]:
    """Router -> what the experts beside it are called with in the next forward."""
    seen = {}
    for name, router in routers.items():
        if router.layer is not None:
            router.layer.experts.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: seen.update({name: [*args, *kwargs.values()]}),
                with_kwargs=True,
            )
    return seen


def slow_balance_loss(scores_TE: torch.Tensor, index_TK: torch.Tensor) -> float:
    """sum_i f_i P_i, token by token."""
    tokens, experts = scores_TE.shape
    counts, shares = [0.0] * experts, [0.0] * experts
    for row, chosen in zip(scores_TE.tolist(), index_TK.tolist(), strict=True):
        for expert in set(chosen) & set(range(experts)):
            counts[expert] += 1
        for expert, score in enumerate(row):
            shares[expert] += score / sum(row) / tokens
    return sum(experts * count / sum(counts) * share for count, share in zip(counts, shares, strict=True))


# Further kinds of layers of a family: no class names the routers of these, and no other router stands beside them.
CASES = {model_type: {} for model_type in FAMILIES} | {"deepseek_v4, hash": {"mlp_layer_types": ["hash_moe"] * 4}}


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_of_a_router_is_what_its_layer_does(case):
    model_type = case.partition(",")[0]
    model = tiny(model_type, **CASES[case])
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.random.get_rng_state()
    routers = find_routers(model)
    assert routers
    affinities = {name: router.affinity for name, router in routers.items()}
    biases = SelectionBias(routers)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())

    top_k = routed_experts(model.config)[1]
    assert top_k == (1 if model_type == "zaya" else TOP_K)
    seen = calls_of_experts(model, routers)
    with captured(routers, top_k) as routings, torch.no_grad():
        model(input_ids=ids(model), use_cache=False)
    assert routings.keys() == routers.keys()
    for name, routing in routings.items():
        scores = affinities[name](routing.logits_TE.float())
        assert routing.index_SK.shape == (18, top_k)
        called = [x for x in seen.get(name, []) if torch.is_tensor(x)]
        index = next((x for x in called[1:] if not x.is_floating_point()), None)
        if index is None:  # no call of experts shows it
            assert model.config.get_text_config().model_type in KNOWN, name
            slow = torch.stack([SCORES[model_type](row) for row in routing.logits_TE.float()])
            torch.testing.assert_close(scores, slow)
            continue
        weights = next(x for x in called[1:] if x.is_floating_point())
        assert torch.equal(index.sort().values, routing.index_SK.sort().values), name
        order = [x.argsort() for x in (index, routing.index_SK)]
        torch.testing.assert_close(
            weights.gather(1, order[0]), routing.weights_SK.gather(1, order[1]), rtol=1e-5, atol=1e-5
        )
        if model_type not in SCORES:
            factors = weights.float() / scores.gather(1, index)
            torch.testing.assert_close(factors, factors[:, :1].expand_as(factors), rtol=1e-4, atol=1e-4)
        batch = routed(routing.logits_TE, scores, routing.index_SK)
        loss = expert_loss(batch, statistics(batch), model.config)
        assert loss.item() == pytest.approx(slow_balance_loss(scores, index), rel=1e-5)

    # A selection bias: the expert that it lifts is chosen by every token, with weights of the same scores.
    named = [name for name in before if name.endswith(("e_score_correction_bias", "expert_bias", "balancing_biases"))]
    assert bool(biases.biases) == bool(named)
    for bias in biases.biases.values():
        bias.data.view(-1)[1] += 100
    with captured(routers, top_k) as lifted, torch.no_grad():
        model(input_ids=ids(model), use_cache=False)
    for name in biases.biases:
        assert (lifted[name].index_SK == 1).any(dim=-1).all(), name


def test_a_choice_of_no_expert_counts_nowhere(tmp_path):
    model = tiny("zaya")
    for name, bias in model.named_buffers():
        if name.endswith("balancing_biases"):
            bias.zero_()
    routers = find_routers(model)
    biases = SelectionBias(routers)
    balance = Balance(model, routers, MoeTrainingArguments(str(tmp_path), use_cpu=True, router_aux_loss_coef=0.01))
    inputs = {"input_ids": ids(model)}
    with captured(routers, 1) as routings, torch.no_grad():
        model(**inputs, use_cache=False)
    layers = balance.read(routings, inputs)
    counted = balance.count(layers)
    losses = balance.losses(layers, counted)["router_aux_loss_coef"]
    sums = split(rows(layers, counted, {}, torch.device("cpu")), [EXPERTS] * len(routers), 0)
    none = 0
    for (name, routing), loss, (numbers, _) in zip(routings.items(), losses, sums, strict=True):
        scores = torch.stack([row.exp() / row.exp().sum() for row in routing.logits_TE])
        chosen = [max(range(EXPERTS + 1), key=row.__getitem__) for row in scores.tolist()]
        none += chosen.count(EXPERTS)
        assert routing.index_SK.flatten().tolist() == chosen
        assert counted[name].counts_E.tolist() == [chosen.count(expert) for expert in range(EXPERTS)]
        assert loss.item() == pytest.approx(slow_balance_loss(scores[:, :EXPERTS], routing.index_SK), rel=1e-5)
        assert numbers[DROPPED] == 0
    assert 0 < none < 18 * len(routers)
    biases.update({name: counts.counts_E for name, counts in counted.items()}, 1e-3)
    for name, bias in biases.biases.items():
        counts = counted[name].counts_E
        assert torch.equal(bias.sign(), torch.cat([(counts.mean() - counts).sign(), torch.zeros(1)]))


@pytest.mark.parametrize("lifted", [0, 100], ids=["some", "all"])
def test_scores_are_read_where_tokens_skip(lifted):
    model = tiny("zaya")
    for name, bias in model.named_buffers():
        if name.endswith("balancing_biases"):
            bias.zero_()[-1] = lifted
    logits = torch.randn(3, EXPERTS + 1)
    for router in find_routers(model).values():
        torch.testing.assert_close(router.affinity(logits), logits.softmax(-1))
        assert router.bias is not None


def test_experts_that_compute_nothing_are_none():
    model = tiny("longcat_flash")
    routers = find_routers(model)
    for router in routers.values():
        router.bias.zero_()
    seen = calls_of_experts(model, routers)
    with captured(routers, TOP_K) as routings, torch.no_grad():
        model(input_ids=ids(model), use_cache=False)
    for name, routing in routings.items():
        counts = RouterCounts(routing.experts, 1, 0, torch.device("cpu"))
        counts.add(routing, routers[name], 0, torch.arange(18), *torch.full((2, 18), -1))
        slow = [int((seen[name][1] == expert).sum()) for expert in range(EXPERTS + 2)]
        assert sum(slow[EXPERTS:]) > 0 and counts.chosen_NE.tolist() == [slow[:EXPERTS]]
        assert 0 < counts.first_NE.sum() < 18
        p = routing.logits_TE.softmax(-1)[:, :EXPERTS]
        entropies = -(p / p.sum(-1, keepdim=True)).log().mul(p / p.sum(-1, keepdim=True)).sum()
        assert counts.entropy_N.item() == pytest.approx(entropies.item(), rel=1e-5)


def test_those_left_out_are_there():
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert LEFT_OUT.keys() <= MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    assert len(FAMILIES) >= 50


def test_scores_that_nothing_explains_are_refused_by_name(monkeypatch):
    model = tiny("mixtral")
    gate = model.model.layers[0].mlp.gate
    forward = gate.forward

    def cubed(*args):
        logits, _, index = forward(*args)
        return logits, logits.gather(1, index) ** 3, index

    monkeypatch.setattr(gate, "forward", cubed)
    router = find_routers(model)["model.layers.0.mlp.gate"]
    with pytest.raises(ValueError, match=r"^What model.layers.0.mlp.gate of Mixtral.* scores .* is unknown \("):
        router.affinity  # noqa: B018


def test_one_chosen_expert_tells_its_scores_too():
    affinity = find_routers(tiny("mixtral", num_experts_per_tok=1))["model.layers.0.mlp.gate"].affinity
    logits = torch.randn(3, 8)
    torch.testing.assert_close(affinity(logits), logits.softmax(-1))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_routers_of_16_bits_are_read_as_those_of_32(model_type):
    def read(model):
        return {name: router.found._replace(reason="") for name, router in find_routers(model).items()}

    expected, model = read(tiny(model_type)), tiny(model_type).to(torch.bfloat16)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    assert read(model) == expected
    after = model.state_dict()
    assert all(x.dtype == after[name].dtype and torch.equal(x, after[name]) for name, x in before.items())
