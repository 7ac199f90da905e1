"""A token takes experts, best first, until their probabilities sum to p: at most num_experts_per_tok of them."""

from hf_moe.model.routing import (
    ROUTERS,
    Assignment,
    Range,
    Router,
    choose,
    leave_empty,
    normalized,
    softmax_affinity,
    weights_of,
)


def my_top_p(logits, config, state):
    scores = softmax_affinity(logits)
    best = choose(scores, config, state)
    weights = weights_of(scores, best)
    before = weights.cumsum(dim=-1) - weights
    chosen = leave_empty(best, before >= config.router_args.get("p", 0.5), config.num_experts, state)
    return Assignment(normalized(weights_of(scores, chosen), config), chosen)


ROUTERS["my_top_p"] = Router(softmax_affinity, my_top_p, {"p": Range(0.0, 1.0)})
