"""my_router: a token takes its best expert, and of the next ones those that come near it.

Say what it does, and whose idea it is. Shapes: T tokens, E routed experts, K slots per token.
"""

import torch

from hf_moe.model.routing import (
    ROUTERS,
    Assignment,
    Range,
    Router,
    RouterState,
    choose,
    leave_empty,
    normalized,
    softmax_affinity,
    weights_of,
)


def my_router(logits, config, state):
    """Weights and experts [T, K] of float32 logits [T, E]; an index of E is an empty slot: nothing is done for it."""
    scores = softmax_affinity(logits)
    best = choose(scores, config, state)  # K a token, best first
    weights = weights_of(scores, best)
    far = weights < config.router_args.get("share", 0.5) * weights[:, :1]
    chosen = leave_empty(best, far, config.num_experts, state)
    return Assignment(normalized(weights_of(scores, chosen), config), chosen)


# By this line training, generating, tracing and saving know it: its scores for the losses, and what router_args may
# hold. A router with parameters or a state of its own names its class here, too: module=MyRouter.
ROUTERS["my_router"] = Router(softmax_affinity, my_router, {"share": Range(0.0, 1.0)})


def slow(row: list[float], top_k: int, share: float) -> dict[int, float]:
    """One token's experts and their weights, from the definition."""
    powers = [2.718281828459045**x for x in row]
    scores = [x / sum(powers) for x in powers]
    best = sorted(range(len(row)), key=lambda expert: -scores[expert])[:top_k]
    return {expert: scores[expert] for expert in best if scores[expert] >= share * scores[best[0]]}


def test_my_router():
    from hf_moe.model.configuration_hf_moe import HfMoeConfig

    config = HfMoeConfig(num_experts=7, num_experts_per_tok=3, router_type="my_router", router_args={"share": 0.4})
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    weights, index, _ = my_router(logits, config, RouterState())
    for row, experts, gates in zip(logits.tolist(), index.tolist(), weights.tolist(), strict=True):
        expected = slow(row, 3, 0.4)
        found = {expert: gate for expert, gate in zip(experts, gates, strict=True) if expert < 7}
        assert found.keys() == expected.keys()
        assert all(abs(found[expert] - gate) < 1e-5 for expert, gate in expected.items())
        assert all(gate == 0 for expert, gate in zip(experts, gates, strict=True) if expert == 7)
