"""Routers: pure functions from router logits to an assignment of tokens to experts.

`ROUTERS` at the end names them all.

Shape suffixes: T tokens, E routed experts, K experts per token, G expert groups, C expert capacity, V vocabulary.
Logits come in float32. A router owns no parameters and keeps no state: its module does (`router.py`). In training
some draw random numbers or look at other tokens; outside training each gives a token the same experts whatever stands
beside or after it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from .assignment import Assignment, RouterState, leave_empty, replayed, weights_of
from .balanced_assignment import auction, sinkhorn
from .expert_threshold import HfMoeThresholdRouter
from .hashing import HASHES, HfMoeHashedChoice, HfMoeHashRouter
from .null_experts import HfMoeNullRouter
from .relu_routing import HfMoeReluRouter, l1_penalty
from .router import HfMoePolicyRouter, HfMoeRouter, added

__all__ = [  # what routers elsewhere are made of
    "ROUTERS",
    "Assignment",
    "HfMoeRouter",
    "Range",
    "Router",
    "RouterState",
    "choose",
    "drop_overflow",
    "leave_empty",
    "normalized",
    "replayed",
    "sigmoid_affinity",
    "softmax_affinity",
    "sqrt_softplus_affinity",
    "weights_of",
]


# ---- scores ----


def softmax_affinity(logits_TE: torch.Tensor) -> torch.Tensor:
    """Softmax over the experts (Switch, https://arxiv.org/abs/2101.03961, eq. 1)."""
    return logits_TE.softmax(dim=-1)


def sigmoid_affinity(logits_TE: torch.Tensor) -> torch.Tensor:
    """Sigmoid of each logit on its own (DeepSeek-V3, https://arxiv.org/abs/2412.19437, eq. 15)."""
    return logits_TE.sigmoid()


def sqrt_softplus_affinity(logits_TE: torch.Tensor) -> torch.Tensor:
    """sqrt(ln(1 + e^x)) of each logit on its own: DeepSeek-V4's, as Transformers' `deepseek_v4` has it.

    Unlike a sigmoid it does not saturate: with large logits scores go on to tell experts apart.
    """
    # The smallest normal float32: where the softplus underflows the root's gradient would be infinite.
    return torch.nn.functional.softplus(logits_TE).clamp_min(torch.finfo(torch.float32).tiny).sqrt()


# ---- choice ----


def best_expert(scores_TGE: torch.Tensor) -> torch.Tensor:
    """A group counts as much as its best expert (DeepSeek-V2, https://arxiv.org/abs/2405.04434, 2.2.2)."""
    return scores_TGE.amax(dim=-1)


def two_best_experts(scores_TGE: torch.Tensor) -> torch.Tensor:
    """A group counts as much as its two best experts together (DeepSeek-V3, 2.1.2)."""
    return scores_TGE.topk(min(2, scores_TGE.shape[-1]), dim=-1).values.sum(dim=-1)


GROUP_SCORES = {"two_best": two_best_experts, "best": best_expert}


def limit_to_groups(
    scores_TE: torch.Tensor, n_group: int, topk_group: int, group_score: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Set the scores outside each token's best `topk_group` of `n_group` equal groups to -inf.

    Device-limited routing in DeepSeek-V2 (2.2.2), node-limited in V3 (2.1.2): a token reaches few machines.
    """
    scores_TGE = scores_TE.view(-1, n_group, scores_TE.shape[-1] // n_group)
    chosen_TG = group_score(scores_TGE).topk(topk_group, dim=-1).indices
    closed_TG = torch.ones_like(scores_TGE[..., 0], dtype=torch.bool).scatter(-1, chosen_TG, False)
    return scores_TGE.masked_fill(closed_TG.unsqueeze(-1), float("-inf")).flatten(-2)


def take_best(choice_TE: torch.Tensor, config: PreTrainedConfig, state: RouterState) -> torch.Tensor:
    """Each token's K best experts, or those that it took before, where they are replayed: [T, K]."""
    return replayed(choice_TE.topk(config.num_experts_per_tok, dim=-1).indices, state)


def choose(scores_TE: torch.Tensor, config: PreTrainedConfig, state: RouterState) -> torch.Tensor:
    """Each token's K best experts by score plus selection bias, within its best groups: [T, K].

    The bias moves the choice and never the weights (aux-loss-free balancing, https://arxiv.org/abs/2408.15664). In a
    layer of `num_hash_layers` they are those that the token's id is hashed to.
    """
    if state.hashed_TK is not None:
        return replayed(state.hashed_TK, state)
    choice_TE = scores_TE.detach()
    if state.bias_E is not None:
        choice_TE = choice_TE + state.bias_E
    if config.topk_group < config.n_group:
        group_score = GROUP_SCORES[config.router_args.get("group_score", "two_best")]
        choice_TE = limit_to_groups(choice_TE, config.n_group, config.topk_group, group_score)
    return take_best(choice_TE, config, state)


# ---- weights ----


def normalized(weights_TK: torch.Tensor, config: PreTrainedConfig) -> torch.Tensor:
    """Divided by their sum where `norm_topk_prob` says so, then scaled."""
    if config.norm_topk_prob:
        # The smallest normal float32: no 0 / 0 where every sigmoid underflows, no change elsewhere.
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return weights_TK * config.routed_scaling_factor


# ---- routers ----


def token_choice(
    logits_TE: torch.Tensor,
    config: PreTrainedConfig,
    state: RouterState,
    affinity: Callable[[torch.Tensor], torch.Tensor],
) -> Assignment:
    """g_i = s_i for the K best experts: Switch (K = 1), Qwen-MoE, OLMoE, Grok, DeepSeek V1 to V3."""
    scores_TE = affinity(logits_TE)
    index_TK = choose(scores_TE, config, state)
    weights_TK = normalized(scores_TE.gather(-1, index_TK), config)
    return drop_overflow(Assignment(weights_TK, index_TK), config, state)


def softmax_of_chosen(logits_TE: torch.Tensor, config: PreTrainedConfig, state: RouterState) -> Assignment:
    """Softmax over the K chosen logits: Mixtral (https://arxiv.org/abs/2401.04088, 2.1), DBRX; sums to 1 as it is."""
    index_TK = choose(softmax_affinity(logits_TE), config, state)
    weights_TK = logits_TE.gather(-1, index_TK).softmax(dim=-1) * config.routed_scaling_factor
    return drop_overflow(Assignment(weights_TK, index_TK), config, state)


def gshard(logits_TE: torch.Tensor, config: PreTrainedConfig, state: RouterState) -> Assignment:
    """Top-2 with normalised gates; in training the second expert stays with probability min(1, 2 g_2).

    GShard (https://arxiv.org/abs/2006.16668, algorithm 1): the less a token needs its second expert, the likelier it
    is dropped.
    """
    scores_TE = softmax_affinity(logits_TE)
    index_TK = choose(scores_TE, config, state)
    gates_TK = scores_TE.gather(-1, index_TK)
    gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True)
    if state.training:
        stays_T = torch.rand_like(gates_TK[:, 1]) < 2 * gates_TK[:, 1]
        gates_TK = gates_TK * torch.stack((torch.ones_like(stays_T), stays_T), dim=-1)
    return drop_overflow(Assignment(gates_TK * config.routed_scaling_factor, index_TK), config, state)


def expert_choice(logits_TE: torch.Tensor, config: PreTrainedConfig, state: RouterState) -> Assignment:
    """Each expert takes the C = capacity_factor K T / E tokens that score highest for it.

    Expert choice (https://arxiv.org/abs/2202.09368). `expert_capacity_factor` defaults to 1: then K is the mean
    number of experts a token gets. The choice sees the whole batch, also tokens that come later, so it is for
    training: outside training each token takes its own K best experts by the same scores, which is causal, and
    different. Padding is never taken.
    """
    if not state.training:
        return token_choice(logits_TE, config, state, softmax_affinity)
    tokens, num_experts = logits_TE.shape
    factor = (config.expert_capacity_factor or 1.0) * config.num_experts_per_tok / num_experts
    scores_TE = softmax_affinity(logits_TE)
    open_TE = scores_TE.detach()
    if state.mask_T is not None:
        open_TE = open_TE.masked_fill(~state.mask_T.bool().unsqueeze(-1), float("-inf"))
    best = open_TE.topk(min(tokens, math.ceil(factor * tokens)), dim=0)  # [C, E]
    token_CE = best.indices
    weights_CE = scores_TE.gather(0, token_CE)
    if state.mask_T is not None:  # capacity follows the tokens that count
        capacity = torch.ceil(factor * state.mask_T.sum())
        taken_CE = (
            torch.arange(len(token_CE), device=token_CE.device).unsqueeze(-1) < capacity
        ) & best.values.isfinite()
        weights_CE = weights_CE * taken_CE
    index_CE = torch.arange(num_experts, device=token_CE.device).expand_as(token_CE)
    weights_S1 = weights_CE.reshape(-1, 1) * config.routed_scaling_factor
    return Assignment(weights_S1, index_CE.reshape(-1, 1), token_CE.reshape(-1))


def hashed(logits_TE: torch.Tensor, config: PreTrainedConfig, state: RouterState) -> Assignment:
    """The experts that the token's id is hashed to, equally weighted (Hash Layers, https://arxiv.org/abs/2106.04426)."""
    weights_TK = torch.full_like(
        state.hashed_TK, config.routed_scaling_factor / config.num_experts_per_tok, dtype=torch.float32
    )
    return drop_overflow(Assignment(weights_TK, state.hashed_TK), config, state)


def balanced(logits_TE: torch.Tensor, config: PreTrainedConfig, state: RouterState) -> Assignment:
    """In training a balanced assignment of tokens to experts, outside it the K best; weights are sigmoids.

    BASE (https://arxiv.org/abs/2103.16716) solves the linear assignment by auction: every expert gets T / E tokens.
    S-BASE (https://arxiv.org/abs/2202.01169, appendix B) takes the K best of a Sinkhorn transport plan: near balance.
    """
    choice_TE = logits_TE.detach()
    if state.training:
        choice_TE = SOLVERS[config.router_args.get("solver", "sinkhorn")](choice_TE, state.mask_T)
    index_TK = take_best(choice_TE, config, state)
    weights_TK = normalized(logits_TE.gather(-1, index_TK).sigmoid(), config)
    return drop_overflow(Assignment(weights_TK, index_TK), config, state)


def sampled(logits_TE: torch.Tensor, config: PreTrainedConfig, state: RouterState) -> Assignment:
    """In training K experts drawn from the softmax without replacement, outside it the K best.

    Weights are probabilities. The draw is a policy, trained by REINFORCE on the token's loss
    (https://arxiv.org/abs/2202.01169, 3.3): see `balancing.policy_loss`.
    """
    choice_TE = logits_TE.detach()
    if state.training:  # the K largest of logits plus Gumbel noise are such a draw (https://arxiv.org/abs/1903.06059)
        choice_TE = choice_TE - torch.empty_like(choice_TE).exponential_().log()
    index_TK = take_best(choice_TE, config, state)
    weights_TK = normalized(softmax_affinity(logits_TE).gather(-1, index_TK), config)
    return drop_overflow(Assignment(weights_TK, index_TK), config, state)


def every_expert(logits_TE: torch.Tensor, config: PreTrainedConfig, state: RouterState) -> Assignment:
    """All experts, softmax weights: the dense mixture that sparse ones approximate."""
    index_TE = torch.arange(logits_TE.shape[-1], device=logits_TE.device).expand_as(logits_TE)
    return Assignment(softmax_affinity(logits_TE) * config.routed_scaling_factor, index_TE)


# ---- routers that give tokens different numbers of experts ----


def top_p(logits_TE: torch.Tensor, config: PreTrainedConfig, state: RouterState) -> Assignment:
    """Experts in the order of their probability until those sum to router_args["p"]: at most K a token.

    Dynamic routing (https://arxiv.org/abs/2403.07652): an unsure router takes more experts. Theirs has no K, and a
    loss on the entropy against taking ever more; here K ends it, and what a step takes at most is known.
    """
    scores_TE = softmax_affinity(logits_TE)
    best_TK = choose(scores_TE, config, state)
    scores_TK = weights_of(scores_TE, best_TK)
    before_TK = scores_TK.cumsum(dim=-1) - scores_TK
    index_TK = leave_empty(best_TK, before_TK >= config.router_args.get("p", 0.4), config.num_experts, state)
    return drop_overflow(Assignment(normalized(weights_of(scores_TE, index_TK), config), index_TK), config, state)


def taken(scores_TE: torch.Tensor, left_TE: torch.Tensor, config: PreTrainedConfig, state: RouterState) -> Assignment:
    """All experts but those where `left_TE`, each in a slot of its own: [T, E]."""
    every_TE = torch.arange(config.num_experts, device=scores_TE.device).expand_as(scores_TE)
    index_TE = leave_empty(every_TE, left_TE, config.num_experts, state)
    return drop_overflow(Assignment(normalized(weights_of(scores_TE, index_TE), config), index_TE), config, state)


def above_threshold(logits_TE: torch.Tensor, config: PreTrainedConfig, state: RouterState) -> Assignment:
    """Each expert takes the tokens whose sigmoid is above its threshold: any number a token, K in the mean.

    Expert threshold routing (https://arxiv.org/abs/2603.11535): expert choice that looks at no other token, neither in
    training nor in generation. How the threshold moves: `expert_threshold.py`.
    """
    scores_TE = sigmoid_affinity(logits_TE)
    return taken(scores_TE, scores_TE <= state.threshold_E, config, state)


def rectified(logits_TE: torch.Tensor, config: PreTrainedConfig, state: RouterState) -> Assignment:
    """g_i = relu(x_i), of every expert whose logit is above 0: any number a token, K in the mean.

    ReMoE (https://arxiv.org/abs/2412.14711): no choice, and so a gradient everywhere. What holds it at K is a
    penalty: `relu_routing.py`.
    """
    scores_TE = logits_TE.relu()
    return taken(scores_TE, scores_TE <= 0, config, state)


def with_null_experts(logits_TN: torch.Tensor, config: PreTrainedConfig, state: RouterState) -> Assignment:
    """The K best of N = E + Z experts by softmax, the last Z of which compute nothing and leave their slot empty.

    AdaMoE's null experts (https://arxiv.org/abs/2406.13233), the zero experts of MoE++
    (https://arxiv.org/abs/2410.07348); those of LongCat-Flash (https://arxiv.org/abs/2509.01322) hand the token on,
    times its weight. With `norm_topk_prob` all K weights are divided by their sum, those of null experts, too. How
    many experts tokens take: `null_experts.py`.
    """
    experts = config.num_experts
    scores_TE, scores_TZ = softmax_affinity(logits_TN).tensor_split([experts], dim=-1)
    # In their order a token's m-th empty slot is its m-th best null expert, also where the choice is replayed.
    scores_TN = torch.cat((scores_TE, scores_TZ.sort(dim=-1, descending=True).values), dim=-1)
    choice_TN = scores_TN.detach() if state.bias_E is None else scores_TN.detach() + state.bias_E
    best_TK = choice_TN.topk(config.num_experts_per_tok, dim=-1).indices
    index_TK = leave_empty(best_TK.clamp(max=experts), best_TK >= experts, experts, state)
    empty_TK = index_TK == experts
    null_TK = (experts + empty_TK.cumsum(dim=-1) - 1).clamp(experts, scores_TN.shape[-1] - 1)
    weights_TK = normalized(scores_TN.gather(-1, torch.where(empty_TK, null_TK, index_TK)), config)
    return drop_overflow(Assignment(weights_TK.masked_fill(empty_TK, 0.0), index_TK), config, state)


# ---- capacity ----


def drop_overflow(assignment: Assignment, config: PreTrainedConfig, state: RouterState) -> Assignment:
    """Set to 0 the weights of the slots beyond C = ceil(capacity_factor K T / E) an expert (Switch, 2.2; ST-MoE, 2.2).

    `capacity_priority` says who stays: "position", first choices first and then earlier tokens; or "score", the larger
    weights (batch-prioritised routing, https://arxiv.org/abs/2106.05974, 4). Padding takes no place. In training the
    factor is `expert_capacity_factor`, outside it router_args["eval_capacity_factor"]; None drops nothing.
    """
    factor = config.expert_capacity_factor if state.training else config.router_args.get("eval_capacity_factor")
    if factor is None:
        return assignment
    weights_TK, index_TK, _ = assignment
    tokens, slots = index_TK.shape
    mask_T = torch.ones_like(weights_TK[:, 0]) if state.mask_T is None else state.mask_T.float()
    capacity = torch.ceil(factor * config.num_experts_per_tok * mask_T.sum() / config.num_experts)

    # Slots in the order in which they are served: the k-th choices of all tokens, then the (k+1)-th.
    served_S = torch.arange(tokens * slots, device=index_TK.device)
    if config.router_args.get("capacity_priority", "position") == "score":
        served_S = weights_TK.detach().T.reshape(-1).argsort(descending=True, stable=True)
    expert_S = index_TK.T.reshape(-1)[served_S]
    counted_S = mask_T.repeat(slots)[served_S]
    # The last column is that of empty slots, whose weights are 0.
    taken_SE = torch.nn.functional.one_hot(expert_S, config.num_experts + 1) * counted_S.unsqueeze(-1)
    place_S = taken_SE.cumsum(dim=0).gather(-1, expert_S.unsqueeze(-1)).squeeze(-1)
    fits_S = torch.zeros_like(place_S).scatter(0, served_S, (place_S <= capacity).to(place_S))
    return Assignment(weights_TK * fits_S.view(slots, tokens).T, index_TK)


# ---- registry ----


class Range(NamedTuple):
    """Numbers from low to high: what a numeric entry of `router_args` may be."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"a number from {self.low:g} to {self.high:g}"

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and self.low <= value <= self.high


class Whole(Range):
    """The whole ones of them."""

    def __str__(self) -> str:
        return f"a whole number from {self.low:g} to {self.high:g}"

    def __contains__(self, value: Any) -> bool:
        return isinstance(value, int) and super().__contains__(value)


class Router(NamedTuple):
    """One way to route. `affinity` gives the scores s_{i,t} that losses read, `args` what router_args may hold."""

    affinity: Callable[[torch.Tensor], torch.Tensor]
    assign: Callable[[torch.Tensor, Any, RouterState], Assignment]
    args: dict[str, tuple | Range]
    learned: bool = True  # has router weights
    hashed: bool = False  # a token's id says which experts
    may_hash: bool = False  # chooses by `choose`, so that the first `num_hash_layers` layers can leave that to a hash
    policy: bool = False  # trained by the token's loss
    # A balance loss of its own, weighted by its module's `loss_input`, which is the last argument.
    penalty: Callable[[Any, Any, PreTrainedConfig, torch.Tensor], torch.Tensor] | None = None
    fills: bool = False  # never leaves a slot empty, which some implementations of experts need not look for then
    module: type[HfMoeRouter] = HfMoeRouter  # its parameters and buffers


CAPACITY = {"capacity_priority": ("position", "score"), "eval_capacity_factor": Range(0.0, math.inf)}
# noise: Shazeer's, with a learned scale; jitter: Switch's factor in [1 - eps, 1 + eps] on the router's input; dropout
# on it.
EXPLORATION = {"noise": (False, True), "jitter": Range(0.0, 1.0), "dropout": Range(0.0, 1.0)}
# selection_bias: moved by balancing, counts in the choice alone; router_bias: learned, part of the logits (gpt-oss).
BIASES = {"selection_bias": (False, True), "router_bias": (False, True)}
TOKEN_CHOICE = {**BIASES, "group_score": tuple(GROUP_SCORES), **EXPLORATION, **CAPACITY}

SOLVERS = {"sinkhorn": sinkhorn, "auction": auction}
HASHED = {"hash": tuple(HASHES), "seed": Range(0, 2**31), **CAPACITY}
POLICY = {"policy_coef": Range(0.0, math.inf), "baseline_coef": Range(0.0, math.inf), **CAPACITY}

TOP_P = {"p": Range(0.0, 1.0), **TOKEN_CHOICE}
THRESHOLD = {"decay": Range(0.0, 1.0), **EXPLORATION, **CAPACITY}
L1 = {"l1_start": Range(0.0, math.inf), "l1_factor": Range(1.0, math.inf), **EXPLORATION, **CAPACITY}
NULL = {"null_experts": Whole(1, 2**16), "null_bias_speed": Range(0.0, math.inf), "selection_bias": (False, True)}
NULL |= {"jitter": Range(0.0, 1.0), "dropout": Range(0.0, 1.0), **CAPACITY}

softmax_topk = partial(token_choice, affinity=softmax_affinity)
sigmoid_topk = partial(token_choice, affinity=sigmoid_affinity)
sqrtsoftplus_topk = partial(token_choice, affinity=sqrt_softplus_affinity)

ROUTERS: dict[str, Router] = {
    # softmax, then top-k: Switch, Grok, Qwen-MoE, OLMoE, DeepSeek V1 and V2
    "softmax_topk": Router(softmax_affinity, softmax_topk, TOKEN_CHOICE, fills=True, may_hash=True),
    # top-k, then softmax: Mixtral, DBRX; with noise: Shazeer (https://arxiv.org/abs/1701.06538)
    "topk_softmax": Router(softmax_affinity, softmax_of_chosen, TOKEN_CHOICE, fills=True, may_hash=True),
    # sigmoid, then top-k: DeepSeek-V3, Llama 4
    "sigmoid_topk": Router(sigmoid_affinity, sigmoid_topk, TOKEN_CHOICE, fills=True, may_hash=True),
    # sqrt(softplus), then top-k: DeepSeek-V4
    "sqrtsoftplus_topk": Router(sqrt_softplus_affinity, sqrtsoftplus_topk, TOKEN_CHOICE, fills=True, may_hash=True),
    "gshard": Router(softmax_affinity, gshard, TOKEN_CHOICE, fills=True),
    "expert_choice": Router(softmax_affinity, expert_choice, EXPLORATION, fills=True),
    "hash": Router(softmax_affinity, hashed, HASHED, learned=False, hashed=True, fills=True, module=HfMoeHashRouter),
    "base": Router(sigmoid_affinity, balanced, {"solver": tuple(SOLVERS), **EXPLORATION, **CAPACITY}, fills=True),
    "reinforce": Router(softmax_affinity, sampled, POLICY, policy=True, fills=True, module=HfMoePolicyRouter),
    "dense": Router(softmax_affinity, every_expert, EXPLORATION, fills=True),
    "top_p": Router(softmax_affinity, top_p, TOP_P),
    "expert_threshold": Router(sigmoid_affinity, above_threshold, THRESHOLD, module=HfMoeThresholdRouter),
    "relu": Router(torch.relu, rectified, L1, penalty=l1_penalty, module=HfMoeReluRouter),
    "null_experts": Router(softmax_affinity, with_null_experts, NULL, module=HfMoeNullRouter),
}


def make_router(config: PreTrainedConfig, layer_idx: int) -> HfMoeRouter:
    """The router of a layer, as `router_type` names it.

    Raises ValueError where that is in code which came with the model and was not run.
    """
    if config.router_type not in ROUTERS:
        raise ValueError(
            f"router_type {config.router_type!r} is code that comes with the model, {config.router_code}: look at "
            "that, and load the model with trust_remote_code=True (--trust-remote-code), or name the file (--plugin)."
        )
    router = ROUTERS[config.router_type]
    kind = HfMoeHashedChoice if layer_idx < config.num_hash_layers else router.module
    module = kind(router, config, layer_idx)
    for tensor in added(module).values():  # a model that is made in another type makes all in it
        tensor.data = tensor.data.float()
    return module
