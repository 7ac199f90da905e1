"""Routers: pure functions from router logits to an assignment of tokens to experts.

Shape suffixes: T tokens, E routed experts, K experts per token, G expert groups. Logits come in float32.
A router owns no parameters and keeps no state; the layer does. `ROUTERS` at the end names them all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Assignment(NamedTuple):
    """Which experts each token goes to, and with what weight."""

    weights_TK: torch.Tensor  # float32
    index_TK: torch.Tensor  # int64, in [0, E)


def softmax_affinity(logits_TE: torch.Tensor) -> torch.Tensor:
    """Softmax over the experts (Switch, https://arxiv.org/abs/2101.03961, eq. 1)."""
    return logits_TE.softmax(dim=-1)


def sigmoid_affinity(logits_TE: torch.Tensor) -> torch.Tensor:
    """Sigmoid of each logit on its own (DeepSeek-V3, https://arxiv.org/abs/2412.19437, eq. 15)."""
    return logits_TE.sigmoid()


def best_expert(scores_TGE: torch.Tensor) -> torch.Tensor:
    """A group counts as much as its best expert (DeepSeek-V2, https://arxiv.org/abs/2405.04434, 2.2.2)."""
    return scores_TGE.amax(dim=-1)


def two_best_experts(scores_TGE: torch.Tensor) -> torch.Tensor:
    """A group counts as much as its two best experts together (DeepSeek-V3, 2.1.2)."""
    return scores_TGE.topk(min(2, scores_TGE.shape[-1]), dim=-1).values.sum(dim=-1)


GROUP_SCORES = {"best": best_expert, "two_best": two_best_experts}


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


def token_choice(
    scores_TE: torch.Tensor,
    top_k: int,
    *,
    bias_E: torch.Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "two_best",
) -> torch.Tensor:
    """Each token's K best experts, as an index [T, K].

    `bias_E` moves the choice and never the weights (aux-loss-free balancing, https://arxiv.org/abs/2408.15664).
    """
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if topk_group < n_group:
        choice_TE = limit_to_groups(choice_TE, n_group, topk_group, GROUP_SCORES[group_score])
    return choice_TE.topk(top_k, dim=-1).indices


def gathered_weights(
    logits_TE: torch.Tensor, scores_TE: torch.Tensor, index_TK: torch.Tensor, norm_topk_prob: bool
) -> torch.Tensor:
    """The chosen experts' scores, divided by their sum if `norm_topk_prob`."""
    weights_TK = scores_TE.gather(-1, index_TK)
    if norm_topk_prob:
        # The smallest float32 normal number: no 0 / 0 where every sigmoid underflows, no change elsewhere.
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return weights_TK


def softmax_of_chosen(
    logits_TE: torch.Tensor, scores_TE: torch.Tensor, index_TK: torch.Tensor, norm_topk_prob: bool
) -> torch.Tensor:
    """Softmax over the K chosen logits (Mixtral, https://arxiv.org/abs/2401.04088, 2.1): sums to 1 as it is."""
    return logits_TE.gather(-1, index_TK).softmax(dim=-1)


class Router(NamedTuple):
    """A token-choice router: how logits become scores, how chosen scores become weights, which `router_args` it takes.

    `affinity` gives the scores s_{i,t} that experts are chosen by and that balance losses read.
    """

    affinity: Callable[[torch.Tensor], torch.Tensor]
    weigh: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, bool], torch.Tensor]
    args: dict[str, tuple[Any, ...]]  # name -> the values it may have, the default first


TOKEN_CHOICE_ARGS = {"selection_bias": (False, True), "group_score": ("two_best", "best")}

ROUTERS: dict[str, Router] = {
    # softmax, then top-k: Switch, GShard, Grok, Qwen-MoE, OLMoE, DeepSeek V1 and V2
    "softmax_topk": Router(softmax_affinity, gathered_weights, TOKEN_CHOICE_ARGS),
    # top-k, then softmax: Mixtral, DBRX
    "topk_softmax": Router(softmax_affinity, softmax_of_chosen, TOKEN_CHOICE_ARGS),
    # sigmoid, then top-k: DeepSeek-V3, Llama 4
    "sigmoid_topk": Router(sigmoid_affinity, gathered_weights, TOKEN_CHOICE_ARGS),
}


def route(
    logits_TE: torch.Tensor,
    router_type: str,
    top_k: int,
    *,
    norm_topk_prob: bool = False,
    scaling_factor: float = 1.0,
    bias_E: torch.Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_score: str = "two_best",
) -> Assignment:
    """Scores, choice, weights, scale: the whole token-choice family in four lines."""
    router = ROUTERS[router_type]
    scores_TE = router.affinity(logits_TE)
    index_TK = token_choice(
        scores_TE.detach(), top_k, bias_E=bias_E, n_group=n_group, topk_group=topk_group, group_score=group_score
    )
    weights_TK = router.weigh(logits_TE, scores_TE, index_TK, norm_topk_prob)
    return Assignment(weights_TK * scaling_factor, index_TK)
