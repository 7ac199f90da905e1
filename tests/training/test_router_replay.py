"""Router replay: the recorded experts are taken again, with the weights and the gradient of the present router."""

import pytest
import torch
from hf_moe.training.balance.router_replay import (
    UNKNOWN,
    check_replayable,
    fit,
    of_batches,
    of_generation,
    recording,
    replayed,
)

from hf_moe.routers import find_routers
from tests.families import tiny

from .models import BIASED, hf_moe

ROUTERS = {
    "softmax_topk": {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "topk_softmax": {},
    "sigmoid_topk": BIASED,
    "gshard": {},
    "base": {"norm_topk_prob": False},
    "expert_choice": {"norm_topk_prob": False},
}


def build(router_type: str, **changes):
    single = {"n_group": 1, "topk_group": 1} if router_type in ("base", "expert_choice") else {}
    return hf_moe(**{**single, **ROUTERS[router_type], "router_type": router_type, **changes})


def slow_weights(router_type: str, logits: torch.Tensor, experts: list[int]) -> list[torch.Tensor]:
    """One token's weights of its experts, from the definition of each router."""
    chosen = [logits[e] for e in experts]
    if router_type in ("topk_softmax", "gshard"):
        return [x.exp() / sum(y.exp() for y in chosen) for x in chosen]
    if router_type in ("sigmoid_topk", "base"):
        scores = [1 / (1 + (-x).exp()) for x in chosen]
        return [x / sum(scores) for x in scores] if router_type == "sigmoid_topk" else scores
    scale = 2.5 if router_type == "softmax_topk" else 1.0
    return [scale * x.exp() / sum(y.exp() for y in logits) for x in chosen]


@pytest.mark.parametrize("router_type", ROUTERS)
def test_weights_and_gradient_are_those_of_the_present_router(router_type):
    routers = find_routers(build(router_type))
    name, router = next(iter(routers.items()))
    gate, x = router.module, torch.randn(7, 32)
    generator = torch.Generator().manual_seed(1)
    recorded = torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(7)])
    recorded[3] = UNKNOWN
    own = gate.eval()(x)[2][3]
    gate.train()
    with replayed(routers, {name: recorded.view(1, 7, 2).to(torch.int16)}):
        logits, weights, index, token, _ = gate(x)
    assert token is None and torch.equal(index[:3], recorded[:3]) and torch.equal(index[4:], recorded[4:])
    assert index[3].tolist() == own.tolist()  # where nothing was recorded, as outside training

    factors = torch.randn(7, 2)
    (gradient,) = torch.autograd.grad((weights * factors).sum(), gate.weight)
    again = x @ gate.weight.T
    slow = [slow_weights(router_type, row, experts) for row, experts in zip(again, index.tolist(), strict=True)]
    slow = torch.stack([torch.stack(row) for row in slow])
    torch.testing.assert_close(weights, slow)
    torch.testing.assert_close(gradient, torch.autograd.grad((slow * factors).sum(), gate.weight)[0])
    torch.testing.assert_close(logits, again)


PROMPTS = torch.tensor([[0, 0, 5, 9, 4], [7, 3, 8, 11, 6], [0, 0, 0, 0, 12]])


@pytest.fixture(scope="module")
def rollout():
    """A model, texts that it wrote after left-padded prompts, their log-probabilities and the experts recorded."""
    model = build("sigmoid_topk").eval()
    model.generation_config.eos_token_id = None
    mask = (PROMPTS > 0).long()
    torch.manual_seed(0)
    with recording(find_routers(model)) as calls:
        out = model.generate(
            PROMPTS,
            attention_mask=mask,
            max_new_tokens=6,
            do_sample=True,
            output_logits=True,
            return_dict_in_generate=True,
        )
    texts = out.sequences
    mask = torch.cat([mask, torch.ones(3, 6, dtype=torch.long)], dim=1)
    mask[1, -2:] = 0  # as if the second text had ended
    logps = torch.stack(out.logits, dim=1).log_softmax(-1).gather(-1, texts[:, 5:, None]).squeeze(-1)
    return model, texts, mask, logps, fit(of_generation(calls, 3), mask)


def scores(model, texts, mask):
    """Log-probabilities [3, 6] of what was written, in a training forward, and the experts [3, 11, K] a router."""
    model.train()
    routers = find_routers(model)
    with recording(routers) as calls:
        logits = model(texts, attention_mask=mask, output_router_logits=False).logits
    logps = logits[:, 4:-1].log_softmax(-1).gather(-1, texts[:, 5:, None]).squeeze(-1)
    return logps, {name: parts[0].view(3, 11, 2) for name, parts in calls.items()}


def move_bias(model, scale: float = 1.0):
    """Another choice of experts, with the same weights for each."""
    generator = torch.Generator().manual_seed(5)
    for router in find_routers(model).values():
        router.bias.add_(scale * torch.randn(6, generator=generator))


def test_recorded_indices_cover_the_text_but_its_last_token(rollout):
    _, _, mask, _, indices = rollout
    assert len(indices) == 2
    for index in indices.values():
        known = index != UNKNOWN
        assert index.shape == (3, 11, 2) and torch.equal(known[..., 0], known[..., 1])
        expected = mask.bool() & (mask.flip(1).cumsum(1).flip(1) > 1)  # a text's last token is never read
        assert torch.equal(known[..., 0], expected)


def test_probabilities_are_those_of_the_rollout_after_the_choice_moved(rollout):
    model, texts, mask, logps, indices = rollout
    move_bias(model)
    try:
        moved, own = scores(model, texts, mask)
        with replayed(find_routers(model), indices):
            same, taken = scores(model, texts, mask)
    finally:
        move_bias(model, -1.0)
    read = mask[:, 5:].bool()
    assert (moved - logps)[read].abs().max() > 1e-2
    torch.testing.assert_close(same[read], logps[read], atol=1e-5, rtol=1e-5)
    for name, index in indices.items():
        known = index != UNKNOWN
        assert torch.equal(taken[name][known], index[known])
        assert not torch.equal(own[name][known].sort(-1).values, index[known].sort(-1).values)


def test_second_forward_of_checkpointing_takes_the_same_experts(rollout):
    model, texts, mask, _, indices = rollout
    routers, gradients = find_routers(model), []
    move_bias(model)
    try:
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            with replayed(routers, indices), recording(routers) as calls:
                scores(model, texts, mask)[0].sum().backward()
            for name, parts in calls.items():
                assert len(parts) == 1 + checkpointing and all(torch.equal(part, parts[0]) for part in parts)
                known = indices[name] != UNKNOWN
                assert torch.equal(parts[-1].view(3, 11, 2)[known], indices[name][known])
            gradients.append([x.grad.clone() for x in model.parameters()])
            model.zero_grad()
    finally:
        model.gradient_checkpointing_disable()
        move_bias(model, -1.0)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_routers_of_unknown_weights_are_refused():
    model = tiny("phimoe")
    with pytest.raises(ValueError, match=r"but model.layers.0.mlp.router of PhimoeForCausalLM is not: set it to none"):
        check_replayable(find_routers(model), model)


@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v3", "gpt_oss", "deepseek_v4"])
def test_a_replayed_choice_has_the_gradient_of_the_choice(model_type):
    model, gradients = tiny(model_type), []
    model.gradient_checkpointing_enable()
    routers = find_routers(model)
    with recording(routers) as calls:
        model(PROMPTS, use_cache=False)
    for indices in ({}, of_batches(calls, PROMPTS.shape[1])):
        model.zero_grad()
        with replayed(routers, indices):
            model.train()(PROMPTS, labels=PROMPTS, use_cache=False).loss.backward()
        gradients.append({name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None})
    assert sum(x.any().item() for name, x in gradients[0].items() if "gate" in name or "router" in name)
    torch.testing.assert_close(*gradients)


def test_experts_that_choose_tokens_cannot_be_recorded():
    model = build("expert_choice").train()
    with pytest.raises(ValueError, match="lets experts choose tokens"), recording(find_routers(model)):
        model(PROMPTS[1:2])
