"""Routers of a user's own in a model: tokens with different numbers of experts, parameters, and a state."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoModelForCausalLM

from hf_moe.model.assignment import Assignment, in_slots
from hf_moe.model.balancing import expert_load, routed, statistics
from hf_moe.model.routing import ROUTERS, Router, RouterState, drop_overflow, leave_empty, softmax_affinity
from hf_moe.routers import captured, find_routers
from tests.conftest import tiny_config, tiny_model, tokens


def chosen_by_hand(router_type: str, gate, x: torch.Tensor) -> dict[int, float]:
    """The experts of one token x [D] and what they weigh, from the definition."""
    weight = gate.weight.detach().double()
    logits = (weight @ x.double()).tolist()
    if router_type == "cosine":
        norms = weight.norm(dim=-1).tolist()
        temperature = gate.log_temperature.double().exp().item()
        logits = [
            logit / (norm * x.double().norm().item() * temperature) for logit, norm in zip(logits, norms, strict=True)
        ]
    powers = torch.tensor(logits).double().exp()
    if router_type == "threshold":
        scores = (powers / (1 + powers)).tolist()
        return {e: score for e, score in enumerate(scores) if score > gate.threshold[e].item()}
    scores = (powers / powers.sum()).tolist()
    best, taken, total = sorted(range(len(scores)), key=lambda e: -scores[e]), {}, 0.0
    for e in best[:3]:
        if router_type == "my_top_p" and total >= 0.5:
            break
        taken[e] = scores[e]
        total += scores[e]
    return taken


def own_model(router_type: str, **changes):
    model = tiny_model(router_type=router_type, num_experts_per_tok=3, **changes)
    for gate in (layer.mlp.gate for layer in model.model.layers[1:]):
        if router_type == "threshold":
            nn.init.uniform_(gate.threshold, 0.3, 0.8)
        if router_type == "cosine":
            nn.init.constant_(gate.log_temperature, -0.5)
    return model


def test_a_layer_is_the_sum_over_the_experts_that_a_token_has(router_type):
    block = own_model(router_type).model.layers[1].mlp
    x = torch.randn(1, 11, 48) * 2
    numbers = set()
    with torch.no_grad():
        found = block(x)[0]
        for token in range(11):
            chosen = chosen_by_hand(router_type, block.gate, x[0, token])
            numbers.add(len(chosen))
            slow = sum(weight * block.experts.feed_forward(x[0, token], e) for e, weight in chosen.items())
            torch.testing.assert_close(found[token], slow + torch.zeros(48), rtol=1e-4, atol=1e-5)
    assert numbers == {3} if router_type == "cosine" else len(numbers) > 1, numbers


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm", "hf_moe"])
def test_every_implementation_of_experts_passes_over_empty_slots(router_type, experts):
    if experts == "hf_moe" and not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("needs TRITON_INTERPRET=1 before torch")
    model, ids, found = own_model(router_type).train(), tokens(2, 7), {}
    for name in ("eager", experts):
        model.set_experts_implementation(name)
        model.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        found[name] = {"logits": out.logits.detach()} | gradients
    assert any(name.endswith("gate.weight") for name in found["eager"])
    assert found[experts].keys() == found["eager"].keys()
    for name, expected in found["eager"].items():
        torch.testing.assert_close(found[experts][name], expected, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
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
    if dtype == torch.float32:
        with_cache, without = (
            model.generate(ids[:, :5], max_new_tokens=6, do_sample=False, use_cache=used) for used in (True, False)
        )
        assert torch.equal(with_cache, without)


def test_loads_and_losses_count_the_experts_that_tokens_have(router_type):
    model, ids = own_model(router_type), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    with captured(find_routers(model), 3) as routings, torch.no_grad():
        out = model(ids, attention_mask=mask, labels=ids, output_router_logits=True, output_hidden_states=True)
    by_hand = []
    for i, routing in enumerate(routings.values()):
        block = model.model.layers[i + 1]
        counts = [0] * 7
        with torch.no_grad():
            before = out.hidden_states[i + 1]
            seen = (
                before
                + block.self_attn(
                    block.input_layernorm(before), *positions(model, before), attention_mask=causal(mask)
                )[0]
            )
            for x in block.post_attention_layernorm(seen).flatten(0, 1)[mask.flatten().bool()]:
                for expert in chosen_by_hand(router_type, block.mlp.gate, x):
                    counts[expert] += 1
        affinity = ROUTERS[router_type].affinity(routing.logits_TE)
        batch = routed(routing.logits_TE, affinity, routing.index_SK, mask.flatten())
        assert statistics(batch).counts_E.tolist() == counts
        load = [count * 7 / sum(counts) for count in counts]
        torch.testing.assert_close(expert_load(statistics(batch).counts_E), torch.tensor(load))
        shares = (affinity / affinity.sum(dim=-1, keepdim=True))[mask.flatten().bool()].mean(dim=0)
        by_hand.append((torch.tensor(load) * shares).sum())
    torch.testing.assert_close(out.aux_loss, torch.stack(by_hand).mean())


def positions(model, x):
    return (model.model.rotary_emb(x, torch.arange(x.shape[1])[None]),)


def causal(mask):
    seen = torch.ones(mask.shape[1], mask.shape[1]).tril().bool() & mask[:, None, None].bool()
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


def test_what_a_router_adds_stays_in_float32(router_type, tmp_path):
    model = own_model(router_type)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    made = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    added = {"cosine": ["log_temperature"], "threshold": ["threshold"], "my_top_p": []}[router_type]
    assert loaded.model.layers[1].mlp.gate.weight.dtype == torch.bfloat16
    for name in added:
        tensor, before = (getattr(x.model.layers[1].mlp.gate, name) for x in (loaded, model))
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before)
        assert getattr(made.model.layers[1].mlp.gate, name).dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_rows_that_name_their_tokens(forgotten, training):
    """A router may also give rows, any number a token; outside training they become slots."""

    def by_rows(logits, config, state):
        scores = softmax_affinity(logits)
        token, expert = torch.where(scores > 0.2)
        return Assignment(scores[token, expert, None], expert[:, None], token)

    def by_slots(logits, config, state):
        scores = softmax_affinity(logits)
        every = torch.arange(7).expand_as(logits)
        index = leave_empty(every, scores <= 0.2, 7, state)
        return Assignment(scores.masked_fill(index == 7, 0.0), index)

    outputs = []
    for name, function in {"by_rows": by_rows, "by_slots": by_slots}.items():
        ROUTERS[name] = Router(softmax_affinity, function, {})
        model = tiny_model(router_type=name).train(training)
        out = model(tokens(), labels=tokens(), output_router_logits=True)
        outputs.append((out.loss, out.aux_loss, out.logits))
        with captured(find_routers(model), 3) as routings:
            model(tokens())
        assert all((x.token_S is not None) == (training and name == "by_rows") for x in routings.values())
    for rows, slots in zip(*outputs, strict=True):
        torch.testing.assert_close(rows, slots)


def test_rows_as_slots():
    weights = torch.tensor([[0.5], [0.25], [0.25], [1.0]], requires_grad=True)
    index, token = torch.tensor([[2], [0], [2], [3]]), torch.tensor([0, 1, 1, 2])
    slots = in_slots(Assignment(weights, index, token), 4, 3)
    assert slots.index_TK.tolist() == [[3, 3, 2], [0, 3, 2], [3, 3, 3], [3, 3, 3]]
    assert slots.weights_TK.tolist() == [[0, 0, 0.5], [0.25, 0, 0.25], [0, 0, 0], [0, 0, 0]]
    slots.weights_TK.sum().backward()
    assert weights.grad.flatten().tolist() == [1, 1, 1, 0]  # the last was in an empty slot


def test_capacity_passes_over_empty_slots():
    config = tiny_config(num_experts=3, num_experts_per_tok=2, expert_capacity_factor=0.5)
    index = torch.tensor([[0, 3], [0, 1], [0, 3], [3, 3]])
    weights = torch.tensor([[1.0, 0.0], [0.6, 0.4], [1.0, 0.0], [0.0, 0.0]])
    kept = drop_overflow(Assignment(weights, index), config, RouterState(training=True))  # 2 slots an expert
    assert kept.weights_TK[:, 0].tolist() == pytest.approx([1.0, 0.6, 0.0, 0.0])
    assert kept.weights_TK[1, 1].item() == pytest.approx(0.4) and torch.equal(kept.index_TK, index)


def test_experts_are_replayed_with_their_empty_slots(router_type):
    from hf_moe.training.balance.router_replay import replayed

    model = own_model(router_type)
    routers = find_routers(model)
    name, router = next(iter(routers.items()))
    gate, x, other = router.module, torch.randn(6, 48), torch.randn(6, 48)
    _, _, index, _, _ = gate(x)
    recorded = index.clone()
    recorded[2] = -1
    with replayed(routers, {name: recorded.view(1, 6, -1).to(torch.int16)}):
        logits, weights, again, _, _ = gate(other)
    own = gate(other)
    assert torch.equal(again[[0, 1, 3, 4, 5]], index[[0, 1, 3, 4, 5]]) and torch.equal(again[2], own[2][2])
    scores = ROUTERS[router_type].affinity(logits)
    for token, experts in enumerate(again.tolist()):
        for slot, expert in enumerate(experts):
            expected = 0.0 if expert == 7 else scores[token, expert].item()
            assert weights[token, slot].item() == pytest.approx(expected, abs=1e-6)


def test_a_router_that_does_not_replay_is_refused(forgotten):
    from hf_moe.training.balance.router_replay import replayed

    def best(logits, config, state):
        found = softmax_affinity(logits).topk(2)
        return Assignment(found.values, found.indices)

    ROUTERS["best"] = Router(softmax_affinity, best, {})
    model = tiny_model(router_type="best", num_experts_per_tok=2)
    routers = find_routers(model)
    name = next(iter(routers))
    recorded = torch.tensor([[[6, 5]] * 4], dtype=torch.int16)
    with pytest.raises(ValueError, match="router_type 'best' chooses anew"), replayed(routers, {name: recorded}):
        routers[name].module(torch.randn(4, 48))


def test_what_cannot_leave_slots_empty_is_refused(router_type):
    if router_type == "cosine":
        return
    with pytest.raises(StrictDataclassError, match=f"router_type '{router_type}' gives a token any number"):
        tiny_config(router_type=router_type, attention_type="moa", num_attention_heads=6)
    with pytest.raises(ValueError, match=f"empty slots, which router_type '{router_type}' may leave"):
        tiny_model(router_type=router_type).set_attn_implementation("vllm")
