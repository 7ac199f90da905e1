"""Routers that give tokens different numbers of experts: each beside a slow computation of its rule; in a model."""

import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from hf_moe import HfMoeForCausalLM
from hf_moe.model.balancing import exceeded_by, routed, statistics
from hf_moe.model.relu_routing import l1_penalty
from hf_moe.model.routing import ROUTERS, RouterState
from hf_moe.routers import captured, find_routers
from tests.conftest import tiny_config, tiny_model, tokens
from tests.model.test_routing import route

ARGS = {"top_p": {"p": 0.5}, "expert_threshold": {}, "relu": {}, "null_experts": {"null_experts": 4}}
VARIABLE = pytest.mark.parametrize("router_type", ARGS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
E, K = 7, 3


def test_all_of_them_are_here():
    assert set(ARGS) == {name for name, router in ROUTERS.items() if not router.fills}


# ---- the rules ----


def one_token(router_type, logits, norm=False, scale=1.0, bias=None, threshold=None, p=0.5):
    """{expert: weight} of one token, from lists of floats."""
    powers = [math.exp(x) for x in logits]
    scores = {
        "expert_threshold": [x / (1 + x) for x in powers],
        "relu": [max(x, 0.0) for x in logits],
    }.get(router_type, [x / sum(powers) for x in powers])
    best = sorted(range(len(scores)), key=lambda e: -scores[e] - (bias[e] if bias else 0))[:K]
    if router_type == "top_p":
        chosen = [e for i, e in enumerate(best) if sum(scores[b] for b in best[:i]) < p]
    elif router_type == "null_experts":
        chosen = best
    elif router_type == "relu":
        chosen = [e for e in range(E) if scores[e] > 0]
    else:
        chosen = [e for e in range(E) if scores[e] > threshold[e]]
    total = sum(scores[e] for e in chosen) if norm else 1.0
    return {e: scores[e] / total * scale for e in chosen if e < E}


def taken(weights, index) -> list[dict[int, float]]:
    pairs = zip(index.tolist(), weights.tolist(), strict=True)
    return [{e: w for e, w in zip(*pair, strict=True) if e < E} for pair in pairs]


@VARIABLE
@pytest.mark.parametrize("norm", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize("training", [False, True], ids=["", "training"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "biased"])
def test_formula(router_type, norm, training, masked, biased):
    width = E + 4 if router_type == "null_experts" else E
    logits = torch.randn(29, width) * 1.5
    bias = torch.randn(width) * 0.05 if biased and router_type in ("top_p", "null_experts") else None
    if bias is not None and router_type == "null_experts":
        bias[E:] = bias[E]  # they are alike
    threshold = torch.rand(E)
    config = tiny_config(
        router_type=router_type, router_args=ARGS[router_type], norm_topk_prob=norm, routed_scaling_factor=1.5
    )
    mask = torch.rand(29) > 0.3 if masked else None
    state = RouterState(training, mask, bias, threshold_E=threshold)
    weights, index, token = ROUTERS[router_type].assign(logits, config, state)
    assert token is None and weights.dtype == torch.float32
    said = {"bias": None if bias is None else bias.tolist(), "threshold": threshold.tolist()}
    slow = [one_token(router_type, row.tolist(), norm, 1.5, **said) for row in logits]
    for found, expected in zip(taken(weights, index), slow, strict=True):
        assert found == pytest.approx(expected, abs=1e-6)
    assert len({len(row) for row in slow}) >= 2
    assert (weights[index == E] == 0).all()


@VARIABLE
@DTYPES
def test_a_layer_is_the_sum_over_the_experts_that_a_token_has(router_type, dtype):
    block = own_model(router_type).to(dtype).model.layers[1].mlp
    gate, x = block.gate, torch.randn(1, 11, 48).to(dtype)
    rows = [gate.weight.detach()]
    said = {}
    if router_type == "null_experts":
        rows.append(gate.null_weight.detach())
        said["bias"] = [0.0] * E + [gate.null_bias.item()] * len(gate.null_weight)
    if router_type == "expert_threshold":
        said["threshold"] = gate.threshold.tolist()
    logits = x[0].double() @ torch.cat([row.double() for row in rows]).T
    numbers = set()
    with torch.no_grad():
        found = block(x)[0]
        for token in range(11):
            chosen = one_token(router_type, logits[token].tolist(), **said)
            numbers.add(len(chosen))
            slow = sum(w * block.experts.feed_forward(x[0, token], e).double() for e, w in chosen.items())
            close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.02}
            torch.testing.assert_close(found[token].double(), slow + torch.zeros(48).double(), **close)
    assert len(numbers) > 1


def test_top_p_of_1_takes_all_k_and_of_little_one():
    logits = torch.randn(9, E)
    for p, number in ((1.0, K), (1e-6, 1)):
        _, index, _ = route(logits, "top_p", router_args={"p": p})
        assert ((index < E).sum(dim=-1) == number).all()


def test_null_experts_are_given_up_where_their_bias_is_low():
    logits = torch.randn(9, E + 4)
    for bias, number in ((-9.0, K), (9.0, 0)):
        bias_E = torch.cat((torch.zeros(E), torch.full((4,), bias)))
        _, index, _ = route(logits, "null_experts", bias_E=bias_E, nulls=4)
        assert ((index < E).sum(dim=-1) == number).all()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 3 / 7, 0.99, 1.0])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_as_many_scores_exceed_it_as_are_to(share, masked):
    scores = torch.randn(53, 5)
    mask = (torch.rand(53) > 0.4).float() if masked else torch.ones(53)
    found = exceeded_by(scores, share, mask)
    above = ((scores > found) & mask.bool().unsqueeze(-1)).sum(dim=0)
    assert (above == min(round(share * mask.sum().item()), mask.sum().item() - 1)).all()
    assert all((scores[mask.bool()][:, e] == found[e]).any() for e in range(5))
    assert torch.equal(exceeded_by(scores, share, torch.zeros(53)), torch.zeros(5))


# ---- what a batch tells, and what moves ----


def batch_of(router_type, gate, x, mask):
    logits, _, index, *_ = gate(x, mask)
    return routed(logits, gate.router.affinity(logits)[:, :E], index, mask), index


@VARIABLE
def test_its_state_moves_by_what_tokens_that_count_say(router_type):
    gate = own_model(router_type).model.layers[1].mlp.gate
    batches, total, numbers = [torch.randn(31, 48), torch.randn(17, 48)], 0.0, []
    before = {name: x.clone() for name, x in gate.named_buffers()}
    for x in batches:
        mask = (torch.rand(len(x)) > 0.3).float()
        batch, index = batch_of(router_type, gate, x, mask)
        observed = gate.observed(batch)
        if router_type == "top_p":
            assert observed is None
            return
        total = total + observed
        scores = (x @ gate.weight.T).sigmoid()[mask.bool()]
        numbers.append((scores, (index[mask.bool()] < E).sum().item(), int(mask.sum())))
    with torch.no_grad():
        gate.moved(total)
    mean_k = sum(chosen for _, chosen, _ in numbers) / sum(count for *_, count in numbers)
    if router_type == "expert_threshold":
        for e in range(E):
            thresholds = []
            for scores, _, count in numbers:
                ranked = sorted(scores[:, e].tolist(), reverse=True)
                thresholds.append(ranked[round(K / E * count)] * count)
            mean = sum(thresholds) / sum(count for *_, count in numbers)
            expected = 0.9 * before["threshold"][e].item() + 0.1 * mean
            assert gate.threshold[e].item() == pytest.approx(expected, rel=1e-5)
    elif router_type == "relu":
        sparsity = 1 - mean_k / E
        factor = 1.2 if sparsity < 1 - K / E else 1 / 1.2
        assert mean_k != K and gate.l1_coef.item() == pytest.approx(before["l1_coef"].item() * factor, rel=1e-5)
    else:
        target = K * E / (E + 4)
        step = 1e-3 if mean_k > target else -1e-3
        assert mean_k != target
        assert gate.null_bias.item() == pytest.approx(before["null_bias"].item() + step, abs=1e-7)


def test_the_coefficient_of_the_penalty_goes_both_ways():
    gate = own_model("relu").model.layers[1].mlp.gate
    with torch.no_grad():
        gate.l1_coef.fill_(2.0)
        for mean_k, expected in ((K + 1, 2.4), (K - 1, 2.0), (K, 2.0)):
            gate.moved(torch.tensor([mean_k * 10.0, 10.0]))
            assert gate.l1_coef.item() == pytest.approx(expected)


@DTYPES
def test_the_penalty_is_the_load_balanced_l1_norm(dtype):
    logits = torch.randn(19, E).to(dtype).float().requires_grad_()
    mask = torch.rand(19) > 0.3
    config = tiny_config(router_type="relu")
    _, index, _ = route(logits, "relu")
    batch = routed(logits, logits.relu(), index, mask)
    found = l1_penalty(batch, statistics(batch), config, torch.tensor([0.3]))
    (gradient,) = torch.autograd.grad(found, logits)
    kept = [row for row, counts in zip(logits.tolist(), mask.tolist(), strict=True) if counts]
    loads = [E / (K * len(kept)) * sum(row[e] > 0 for row in kept) for e in range(E)]
    slow = 0.3 / len(kept) * sum(loads[e] * max(row[e], 0) for row in kept for e in range(E))
    assert found.item() == pytest.approx(slow, rel=1e-5)
    by_hand = torch.tensor([[0.3 / len(kept) * f for f in loads]]) * (logits > 0) * mask.unsqueeze(-1)
    torch.testing.assert_close(gradient, by_hand)


def test_the_models_loss_has_the_penalty():
    model, ids = own_model("relu", router_aux_loss_coef=0.0).train(), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    for number, layer in enumerate(model.model.layers[1:]):
        nn.init.constant_(layer.mlp.gate.l1_coef, 0.1 * (number + 1))
    with captured(find_routers(model), K) as routings:
        out = model(ids, attention_mask=mask, labels=labels)
    plain = model(ids, attention_mask=mask, labels=labels, output_router_logits=False).loss
    torch.testing.assert_close(model.eval()(ids, attention_mask=mask, labels=labels).loss, plain)
    batches = [routed(x.logits_TE, x.logits_TE.relu(), x.index_SK, mask.flatten()) for x in routings.values()]
    penalties = [
        l1_penalty(batch, statistics(batch), model.config, torch.tensor([coefficient]))
        for coefficient, batch in zip((0.1, 0.2), batches, strict=True)
    ]
    torch.testing.assert_close(out.router_losses["router_penalty"], sum(penalties) / 2)
    torch.testing.assert_close(out.loss, plain + sum(penalties) / 2)
    assert sum(penalties) > 0.01


# ---- in a model ----


def own_model(router_type: str, **changes):
    model = tiny_model(router_type=router_type, router_args=ARGS[router_type], num_experts_per_tok=K, **changes)
    for gate in (layer.mlp.gate for layer in model.model.layers[1:]):
        if router_type == "expert_threshold":
            nn.init.uniform_(gate.threshold, 0.3, 0.8)
        if router_type == "null_experts":
            nn.init.uniform_(gate.null_bias, -0.1, 0.1)
    return model


@VARIABLE
@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "hf_moe"])
def test_every_implementation_of_experts_agrees(router_type, experts):
    if experts == "hf_moe" and not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1 before torch")
    model, ids, found = own_model(router_type).train(), tokens(2, 7), {}
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for name in ("eager", experts):
        model.set_experts_implementation(name)
        model.zero_grad()
        out = model(ids, labels=ids, attention_mask=mask)
        out.loss.backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        found[name] = {"logits": out.logits.detach()} | gradients
    assert {"model.layers.1.mlp.gate.weight", "model.layers.2.mlp.gate.weight"} <= found["eager"].keys()
    assert all(found["eager"][name].any() for name in found["eager"] if ".gate." in name)
    assert found[experts].keys() == found["eager"].keys()
    for name, expected in found["eager"].items():
        torch.testing.assert_close(found[experts][name], expected, rtol=1e-3, atol=1e-5, msg=name)


@VARIABLE
@DTYPES
def test_decodes_with_a_cache_as_without(router_type, dtype):
    model, ids = own_model(router_type).to(dtype), tokens(2, 12)
    with torch.no_grad():
        whole, cache, parts = model(ids).logits, None, []
        for start, end in ((0, 5), (5, 6), (6, 9), (9, 12)):
            out = model(ids[:, start:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=tolerance, atol=tolerance)


@VARIABLE
def test_compiles_into_one_graph(router_type):
    model, ids = own_model(router_type), tokens(2, 9)
    model.set_experts_implementation("batched_mm")
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, use_cache=False).logits
        torch.testing.assert_close(compiled, model(ids).logits)


@pytest.mark.gpu
@VARIABLE
def test_a_recorded_text_is_the_plain_one(router_type):
    model, ids = own_model(router_type).to("cuda"), tokens(2, 6).to("cuda")
    model.set_experts_implementation("grouped_mm")
    options = {"max_new_tokens": 20, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), model.generate(ids, disable_compile=True, **options))


@pytest.mark.gpu
@VARIABLE
@DTYPES
def test_kernels_pass_over_empty_slots(router_type, dtype):
    model, ids, found = own_model(router_type).to("cuda", dtype).train(), tokens(2, 90).to("cuda"), {}
    for name in ("eager", "hf_moe"):
        model.set_experts_implementation(name)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        found[name] = {key: p.grad.float() for key, p in model.named_parameters() if p.grad is not None}
    close = 1e-3 if dtype == torch.float32 else 0.05
    for name, expected in found["eager"].items():
        assert (found["hf_moe"][name] - expected).norm() <= close * expected.norm() + 1e-6, name


@VARIABLE
def test_saved_and_loaded_it_computes_the_same(router_type, tmp_path):
    model, ids = own_model(router_type), tokens(2, 9)
    model.save_pretrained(tmp_path)
    loaded = HfMoeForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in loaded.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    halved = HfMoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    added = {"expert_threshold": ["threshold"], "relu": ["l1_coef"], "null_experts": ["null_weight", "null_bias"]}
    for name in added.get(router_type, []):
        kept, before = (getattr(x.model.layers[2].mlp.gate, name) for x in (halved, model))
        assert kept.dtype == torch.float32 and torch.equal(kept, before)


@VARIABLE
def test_loads_count_the_experts_that_tokens_have(router_type):
    model, ids = own_model(router_type), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with captured(find_routers(model), K) as routings, torch.no_grad():
        out = model(ids, attention_mask=mask, output_router_logits=True)
    losses = []
    for routing in routings.values():
        scores = ROUTERS[router_type].affinity(routing.logits_TE)[mask.flatten().bool(), :E].double()
        chosen = routing.index_SK[mask.flatten().bool()].flatten().tolist()
        counts = torch.tensor([chosen.count(e) for e in range(E)]).double()
        shares = (scores / scores.sum(dim=-1, keepdim=True)).nan_to_num().mean(dim=0)
        losses.append((counts / counts.sum() * E * shares).sum().item())
        assert routing.experts == E
    assert out.aux_loss.item() == pytest.approx(sum(losses) / 2, rel=1e-4)


@VARIABLE
@pytest.mark.parametrize("norm", [False, True], ids=["raw", "normalised"])
def test_experts_are_replayed_with_their_empty_slots(router_type, norm):
    from hf_moe.training.balance.router_replay import replayed

    model = own_model(router_type, norm_topk_prob=norm)
    routers = find_routers(model)
    name, router = next(iter(routers.items()))
    x, other = torch.randn(6, 48), torch.randn(6, 48)
    _, weights, index, _, _ = router.module(x)
    recorded = index.clone()
    recorded[2] = -1
    kept = [0, 1, 3, 4, 5]
    with replayed(routers, {name: recorded.view(1, 6, -1).to(torch.int16)}):
        assert torch.equal(router.module(x)[2], index)
        torch.testing.assert_close(router.module(x)[1], weights)
        _, _, again, _, _ = router.module(other)
    assert torch.equal(again[kept], index[kept]) and torch.equal(again[2], router.module(other)[2][2])


def test_tokens_without_an_expert_have_no_gradient_and_no_nan():
    """Weights are divided by a sum of none."""
    logits = torch.full((3, E), -1.0, requires_grad=True)
    for router_type in ("relu", "expert_threshold"):
        weights, index, _ = route(logits, router_type, norm_topk_prob=True)
        (gradient,) = torch.autograd.grad(weights.sum(), logits)
        assert (index == E).all() and not weights.any() and not gradient.any()


# ---- what is refused ----


@VARIABLE
def test_what_cannot_leave_slots_empty_is_refused(router_type):
    with pytest.raises(StrictDataclassError, match=f"router_type '{router_type}' gives a token any number"):
        tiny_config(router_type=router_type, attention_type="moa", num_attention_heads=6)
    with pytest.raises(ValueError, match=f"empty slots, which router_type '{router_type}' may leave"):
        tiny_model(router_type=router_type).set_attn_implementation("vllm")


@pytest.mark.parametrize("number", [0, 1.5, True, "2"])
def test_null_experts_are_a_whole_number(number):
    with pytest.raises(StrictDataclassError, match=r"'null_experts'\] is .*; it can be a whole number from 1 to"):
        tiny_config(router_type="null_experts", router_args={"null_experts": number})
