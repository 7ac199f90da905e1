"""The routers that draw, drop, hash or see the whole batch: each against a slow computation of its paper's rule."""

import math
from itertools import permutations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_moe.model.balanced_assignment import auction, sinkhorn
from hf_moe.model.hashing import HASHES, frequency_hash, spread
from hf_moe.model.routing import ROUTERS, RouterState, drop_overflow, make_router
from tests.conftest import tiny_config, tiny_model, tokens
from tests.model.test_routing import route

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


# ---- GShard ----


@DTYPES
def test_gshard_keeps_the_second_expert_with_twice_its_gates_probability(dtype):
    logits = torch.randn(1, 7).to(dtype).float().expand(20000, 7)
    weights, index, _ = route(logits, "gshard", 2, training=True)
    p = sorted(logits[0].double().softmax(-1).tolist())[-2:]
    gate = p[0] / sum(p)
    assert (index == index[0]).all()
    assert weights[:, 0].unique().item() == pytest.approx(1 - gate, rel=1e-5)
    kept = weights[:, 1] > 0
    assert weights[kept, 1].unique().item() == pytest.approx(gate, rel=1e-5)
    assert kept.float().mean().item() == pytest.approx(min(1, 2 * gate), abs=0.02)


def test_gshard_keeps_both_outside_training():
    weights, _, _ = route(torch.randn(9, 7), "gshard", 2)
    torch.testing.assert_close(weights.sum(-1), torch.ones(9))


# ---- exploration ----


def router(training=True, hidden=40, **fields):
    config = tiny_config(hidden_size=hidden, num_attention_heads=4, num_key_value_heads=4, head_dim=10, **fields)
    module = make_router(config, layer_idx=0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module.train(training)


@DTYPES
def test_noisy_top_k_adds_learned_gaussian_noise(dtype):
    """H_i = (x W_g)_i + N(0, 1) softplus((x W_noise)_i): mean and deviation over many draws of one token."""
    module = router(router_type="topk_softmax", router_args={"noise": True}).to(dtype)
    x = torch.randn(1, 40).to(dtype)
    draws = module(x.expand(20000, 40))[0]
    clean = x.float() @ module.weight.float().T
    scale = torch.log1p(torch.exp(x.float() @ module.noise_weight.float().T))
    torch.testing.assert_close(draws.mean(0, keepdim=True), clean, atol=0.05, rtol=0)
    torch.testing.assert_close(draws.std(0, keepdim=True), scale, atol=0.03, rtol=0.03)
    assert torch.equal(module.eval()(x)[0], clean)
    module.train()(x)[0].sum().backward()
    assert module.noise_weight.grad.any()


def test_jitter_stays_within_its_bounds_and_only_in_training():
    module = router(router_args={"jitter": 0.1})
    x = torch.rand(500, 40) + 0.5
    factor = module.explore(x) / x
    assert 0.9 <= factor.min() < 0.91 and 1.09 < factor.max() <= 1.1 + 1e-6
    assert torch.equal(module.eval().explore(x), x)


def test_dropout_is_on_the_routers_input_and_only_in_training():
    module = router(router_args={"dropout": 0.25})
    x = torch.ones(400, 40)
    dropped = module.explore(x)
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert dropped.max().item() == pytest.approx(1 / 0.75)
    assert torch.equal(module.eval().explore(x), x)


# ---- capacity ----


def slow_capacity(weights, index, mask, num_experts, factor, priority):
    """Serve one slot after the other; an expert that has C tokens takes no more."""
    T, K = index.shape
    capacity = math.ceil(factor * K * sum(mask) / num_experts)
    slots = [(k, t) for k in range(K) for t in range(T)]
    if priority == "score":
        slots.sort(key=lambda slot: -weights[slot[1]][slot[0]].item())
    taken, kept = [0] * num_experts, torch.zeros(T, K)
    for k, t in slots:
        if mask[t]:
            expert = index[t, k].item()
            kept[t, k] = taken[expert] < capacity
            taken[expert] += 1
    return weights * kept


@pytest.mark.parametrize("priority", ["position", "score"])
@pytest.mark.parametrize("factor", [0.3, 1.0, 1.25, 100.0])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@DTYPES
def test_capacity(priority, factor, masked, dtype):
    logits = (torch.randn(23, 7) * 2).to(dtype).float()
    mask = torch.rand(23) > 0.3 if masked else torch.ones(23, dtype=torch.bool)
    free = route(logits, "softmax_topk", 3)
    weights, index, _ = route(
        logits,
        "softmax_topk",
        3,
        training=True,
        mask=mask if masked else None,
        expert_capacity_factor=factor,
        router_args={"capacity_priority": priority},
    )
    assert torch.equal(index, free.index_TK)
    expected = slow_capacity(free.weights_TK, index, mask.tolist(), 7, factor, priority)
    torch.testing.assert_close(weights[mask], expected[mask])


def test_capacity_holds_outside_training_only_where_asked():
    logits = torch.randn(23, 7)
    dropless = route(logits, "softmax_topk", 3)
    assert torch.equal(route(logits, "softmax_topk", 3, expert_capacity_factor=0.5).weights_TK, dropless.weights_TK)
    tight = route(logits, "softmax_topk", 3, router_args={"eval_capacity_factor": 0.5}).weights_TK
    assert ((tight == 0) | (tight == dropless.weights_TK)).all() and (tight == 0).any()


def test_a_dropped_token_is_carried_by_the_residual():
    model = tiny_model(num_experts=2, num_experts_per_tok=1, expert_capacity_factor=0.1).train()
    block = model.model.layers[1].mlp
    x = torch.randn(1, 13, 48)
    _, weights, *_ = block.gate(x[0])
    output = block(x)[0]
    assert (weights == 0).any() and (weights > 0).any()
    assert torch.equal(output.abs().sum(-1) == 0, weights[:, 0] == 0)


# ---- expert choice ----


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("factor", [None, 0.5, 2.0])
@DTYPES
def test_each_expert_takes_its_best_tokens(masked, factor, dtype):
    logits = torch.randn(19, 6).to(dtype).float()
    mask = torch.rand(19) > 0.4 if masked else torch.ones(19, dtype=torch.bool)
    weights, index, token = route(
        logits, "expert_choice", 2, training=True, mask=mask if masked else None, expert_capacity_factor=factor
    )
    scores = logits.double().softmax(-1)
    capacity = math.ceil((factor or 1.0) * 2 * mask.sum().item() / 6)
    expected = {}
    for e in range(6):
        ranked = sorted(mask.nonzero().flatten().tolist(), key=lambda t: -scores[t, e])
        expected |= {(t, e): scores[t, e].item() for t in ranked[:capacity]}
    taken = zip(token.tolist(), index[:, 0].tolist(), weights[:, 0].tolist(), strict=True)
    assert {(t, e): w for t, e, w in taken if w > 0} == pytest.approx(expected, rel=1e-5)


def test_the_moe_layer_sums_what_the_experts_took():
    model = tiny_model(router_type="expert_choice").train()
    block = model.model.layers[1].mlp
    x = torch.randn(1, 11, 48)
    _, weights, index, token, _ = block.gate(x[0])
    expected = torch.zeros(11, 48)
    for w, e, t in zip(weights[:, 0], index[:, 0], token, strict=True):
        expected[t] += w * block.experts.feed_forward(x[0, t : t + 1], e)[0]
    torch.testing.assert_close(block(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_expert_choice_falls_back_to_token_choice_for_generation():
    logits = torch.randn(9, 7)
    for ours, expected in zip(route(logits, "expert_choice"), route(logits, "softmax_topk"), strict=True):
        assert ours is expected or torch.equal(ours, expected)


# ---- hash ----


@pytest.mark.parametrize("kind", HASHES)
@pytest.mark.parametrize(("V", "E", "K"), [(97, 7, 3), (64, 8, 1), (10, 5, 5)])
def test_hash_tables_are_balanced_and_give_different_experts(kind, V, E, K):
    table = spread(HASHES[kind](V, E, seed=3), K, E)
    counts = table[:, 0].bincount(minlength=E)
    assert counts.max() - counts.min() <= 1
    assert all(len(set(row)) == K for row in table.tolist())


def test_frequency_hash_balances_text():
    counts = torch.tensor([1000 // (i + 1) for i in range(200)])  # Zipf
    experts = frequency_hash(counts, 6).tolist()
    load = [sum(c for c, e in zip(counts.tolist(), experts, strict=True) if e == expert) for expert in range(6)]
    assert max(load) == counts[0] and sorted(load)[-2] - min(load) <= 0.02 * sum(load) / 6
    order = counts.argsort(descending=True, stable=True).tolist()
    running = [0] * 6
    for token in order:
        assert running[experts[token]] == min(running)
        running[experts[token]] += counts[token].item()


def test_hash_routing_depends_on_the_token_alone():
    model = tiny_model(router_type="hash", router_args={"seed": 5})
    gates = [layer.mlp.gate for layer in model.model.layers[1:]]
    assert not torch.equal(gates[0].hash_table, gates[1].hash_table)
    assert not any("gate.weight" in name for name in model.state_dict())
    ids = tokens(2, 9)
    out = model(ids, output_router_logits=True)
    for gate, index in zip(gates, out.router_indices, strict=True):
        assert torch.equal(index, gate.hash_table[ids.flatten()])
    with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
        model(inputs_embeds=torch.randn(1, 3, 48))


@pytest.mark.parametrize("size", [103, 64], ids=["more", "fewer"])
def test_hash_tables_follow_the_vocabulary(size, tmp_path):
    model = tiny_model(router_type="hash", num_mtp_layers=1)
    old = model.model.layers[-1].mlp.gate.hash_table.clone()
    model.resize_token_embeddings(size)
    table = model.model.layers[-1].mlp.gate.hash_table
    assert len(table) == size and torch.equal(table[:97], old[:size])
    ids = torch.tensor([[5, size - 1, 7]])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for saved, router in zip(loaded.hash_routers(), model.hash_routers(), strict=True):
        assert torch.equal(saved.hash_table, router.hash_table)
    # Loaded weights may lie elsewhere, and products of other alignments take other kernels: no bytes to compare.
    torch.testing.assert_close(*(x(ids, labels=ids, output_mtp_loss=True).loss for x in (loaded, model)))


def test_hash_tables_follow_the_text_and_are_saved(tmp_path):
    model = tiny_model(router_type="hash", router_args={"hash": "frequency"})
    counts = torch.arange(97) ** 2
    model.balance_hash_tables(counts)
    expected = spread(frequency_hash(counts, 7), 3, 7).to(counts.device)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for layer in loaded.model.layers[1:]:
        assert torch.equal(layer.mlp.gate.hash_table, expected)
    with pytest.raises(ValueError, match="token_counts has 3 entries, the vocabulary 97"):
        model.balance_hash_tables(counts[:3])


# ---- BASE and S-BASE ----


@pytest.mark.parametrize(("T", "E"), [(6, 3), (7, 3), (6, 2), (5, 1), (3, 5)])
def test_the_auction_finds_the_best_balanced_assignment(T, E):
    logits = torch.randn(T, E)
    assigned = auction(logits)
    assert assigned.sum(-1).tolist() == [1.0] * T
    places = [T // E + (e < T % E) for e in range(E)]
    assert assigned.sum(0).tolist() == places
    slots = [e for e in range(E) for _ in range(places[e])]
    best = max(sum(logits[t, e].item() for t, e in enumerate(p)) for p in set(permutations(slots)))
    assert (assigned * logits).sum().item() == pytest.approx(best, abs=T * 1e-3 + 1e-5)


def test_sinkhorn_reaches_both_marginals():
    plan = sinkhorn(torch.randn(24, 6)).exp()
    torch.testing.assert_close(plan.sum(0), torch.full((6,), 4.0))
    torch.testing.assert_close(plan.sum(1), torch.ones(24), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("solver", ["sinkhorn", "auction"])
def test_base_balances_in_training_and_is_greedy_outside(solver):
    logits = torch.randn(60, 6)
    logits[:, 2] += 3.0  # everybody's favourite
    weights, index, _ = route(logits, "base", 1, training=True, router_args={"solver": solver})
    counts = index.flatten().bincount(minlength=6)
    assert counts.max() <= (10 if solver == "auction" else 20)
    torch.testing.assert_close(weights, logits.gather(-1, index).sigmoid())
    assert torch.equal(route(logits, "base", 1).index_TK[:, 0], logits.argmax(-1))


@pytest.mark.parametrize("solver", ["sinkhorn", "auction"])
def test_padding_takes_no_place_in_a_balanced_assignment(solver):
    logits, mask = torch.randn(20, 4), torch.arange(20) < 12
    solve = {"sinkhorn": sinkhorn, "auction": auction}[solver]
    torch.testing.assert_close(solve(logits, mask)[:12], solve(logits[:12]))


# ---- REINFORCE ----


@DTYPES
def test_reinforce_samples_its_policy(dtype):
    logits = torch.randn(1, 5).to(dtype).float()
    _, index, _ = route(logits.expand(20000, 5), "reinforce", 1, training=True)
    frequency = index.flatten().bincount(minlength=5) / 20000
    torch.testing.assert_close(frequency, logits[0].softmax(-1), atol=0.015, rtol=0)
    assert torch.equal(route(logits, "reinforce", 1).index_TK[0], logits.argmax(-1))


def test_reinforce_samples_without_replacement():
    _, index, _ = route(torch.zeros(2000, 5), "reinforce", 3, training=True)
    assert all(len(set(row)) == 3 for row in index.tolist())


def test_reinforce_learns_from_the_loss_of_its_tokens():
    model = tiny_model(router_type="reinforce", router_aux_loss_coef=0.0).train()
    ids = tokens(3, 15)
    torch.manual_seed(5)
    loss = model(ids, labels=ids).loss
    loss.backward()
    gate = model.model.layers[1].mlp.gate
    assert gate.weight.grad.any() and gate.baseline_weight.grad.any()
    model.config.router_args = {"policy_coef": 0.0, "baseline_coef": 0.0}
    torch.manual_seed(5)
    assert model(ids, labels=ids).loss != loss


# ---- dense ----


def test_dense_uses_every_expert_with_its_softmax_weight():
    logits = torch.randn(9, 7)
    weights, index, _ = route(logits, "dense")
    torch.testing.assert_close(weights, logits.softmax(-1))
    assert torch.equal(index, torch.arange(7).expand(9, 7))


# ---- what holds for all ----


def slots(assignment):
    """{(token, expert): weight} of the slots that were not dropped."""
    weights, index, token = assignment
    rows = torch.arange(len(index)) if token is None else token
    pairs = zip(rows.unsqueeze(-1).expand_as(index).flatten().tolist(), index.flatten().tolist(), strict=True)
    return {pair: w for pair, w in zip(pairs, weights.flatten().tolist(), strict=True) if w != 0}


@pytest.mark.parametrize("router_type", ROUTERS)
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_properties(router_type, data):
    T, E = data.draw(st.integers(2, 17), label="T"), data.draw(st.integers(3, 9), label="E")
    ties = router_type == "expert_choice"  # of softmaxes that are 1, between tokens, which the order decides
    spread_of = data.draw(st.sampled_from([0.1, 1.0] if ties else [0.1, 1.0, 30.0]), label="spread")
    training = data.draw(st.booleans(), label="training")
    factor = data.draw(st.sampled_from([None, 0.5, 1.0]), label="capacity factor")
    seed = data.draw(st.integers(0, 99), label="seed")
    top_k = 2 if router_type == "gshard" else data.draw(st.integers(1, 3), label="K")
    generator = torch.Generator("cpu").manual_seed(seed)
    width = E + 2 if router_type == "null_experts" else E
    logits = (torch.randn(T, width, generator=generator, device="cpu") * spread_of).to(torch.get_default_device())
    hashed = torch.stack([torch.randperm(E)[:top_k] for _ in range(T)]) if router_type == "hash" else None
    fields = {"top_k": top_k, "training": training, "expert_capacity_factor": factor}

    def run(rows, mask=None):
        torch.manual_seed(seed)
        return route(logits[rows], router_type, hashed=None if hashed is None else hashed[rows], mask=mask, **fields)

    every = torch.arange(T)
    out = run(every)
    assert out.weights_TK.isfinite().all() and (out.weights_TK >= 0).all()
    assert out.index_TK.min() >= 0 and out.index_TK.max() < E + (not ROUTERS[router_type].fills)
    assert (out.weights_TK[out.index_TK == E] == 0).all()
    if training and factor is not None and router_type != "dense":
        capacity = math.ceil(factor * top_k * T / E)
        load = [sum(e == expert for _, e in slots(out)) for expert in range(E)]
        assert max(load) <= capacity

    draws = router_type in ("gshard", "reinforce") and training
    ordered = training and factor is not None and router_type != "expert_choice"  # earlier tokens come first
    if not draws and not ordered:
        order = torch.randperm(T)
        permuted = {(order[t].item(), e): w for (t, e), w in slots(run(order)).items()}
        if router_type == "base" and training:  # ties and the order of a sum may move a token
            assert len(permuted.keys() ^ slots(out).keys()) <= T // 2
        else:
            assert permuted == pytest.approx(slots(out), rel=1e-4)

    if not draws:  # padding behind the tokens changes nothing for them
        padded = torch.cat((every, every[:1].expand(4)))
        mask = torch.arange(T + 4) < T
        kept = {pair: w for pair, w in slots(run(padded, mask)).items() if pair[0] < T}
        assert kept == pytest.approx(slots(out), rel=1e-4)


@pytest.mark.parametrize("router_type", ROUTERS)
def test_every_router_trains_and_decodes_with_a_cache_as_without(router_type):
    top_k = 2 if router_type == "gshard" else 3
    model = tiny_model(router_type=router_type, num_experts_per_tok=top_k, expert_capacity_factor=1.0)
    ids = tokens(2, 9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    cached = model.eval().generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_capacity_without_overflow_changes_nothing():
    assignment = route(torch.randn(9, 7), "softmax_topk")
    config = tiny_config(expert_capacity_factor=7.0)
    assert torch.equal(drop_overflow(assignment, config, RouterState(training=True)).weights_TK, assignment.weights_TK)
