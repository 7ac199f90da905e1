"""What a router is given and what it answers, and how a token comes to have fewer experts than others.

Shape suffixes: T tokens, D hidden size, E routed experts, K slots per token, S rows of an assignment.
"""

from typing import NamedTuple

import torch


class Assignment(NamedTuple):
    """Which tokens go to which experts, and with what weight.

    Row t belongs to token t. An index of E is an empty slot: nothing is computed for it and it counts nowhere, so
    that tokens may have different numbers of experts. A weight of 0 is a slot that was dropped after it had been
    chosen (capacity); it counts as chosen. Otherwise `token_S` names each row's token, and there may be any number of
    rows a token.
    """

    weights_TK: torch.Tensor  # float32
    index_TK: torch.Tensor  # int64, in [0, E]
    token_S: torch.Tensor | None = None


class RouterState(NamedTuple):
    """What a router may look at beside the logits."""

    training: bool = False
    mask_T: torch.Tensor | None = None  # 1 where a token counts, 0 on padding
    bias_E: torch.Tensor | None = None  # moves the choice, never the weights; with null experts they have one, too
    hashed_TK: torch.Tensor | None = None  # the experts that a token's id is hashed to
    replayed_TK: torch.Tensor | None = None  # experts to take again, whatever their scores; -1: the router's own
    hidden_TD: torch.Tensor | None = None  # what the logits are computed from, in float32
    threshold_E: torch.Tensor | None = None  # what a score must exceed (expert threshold)


def replayed(index_TK: torch.Tensor, state: RouterState) -> torch.Tensor:
    """The index, or what is to be taken again where that is known: [T, K]."""
    return index_TK if state.replayed_TK is None else torch.where(state.replayed_TK < 0, index_TK, state.replayed_TK)


def leave_empty(index_TK: torch.Tensor, empty_TK: torch.Tensor, experts: int, state: RouterState) -> torch.Tensor:
    """The index with slots left empty where `empty_TK`; what is replayed is as it was: [T, K]."""
    return replayed(index_TK.masked_fill(empty_TK, experts), state)


def weights_of(scores_TE: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
    """Each slot's score, 0 where it is empty: [T, K]."""
    experts = scores_TE.shape[-1]
    return scores_TE.gather(-1, index_TK.clamp(max=experts - 1)).masked_fill(index_TK >= experts, 0.0)


def in_slots(assignment: Assignment, tokens: int, experts: int) -> Assignment:
    """Rows that name their tokens as one row a token, whose slot e is expert e or empty: [T, E]."""
    weights_SK, index_SK, token_S = assignment
    place_S = (token_S.unsqueeze(-1) * (experts + 1) + index_SK).reshape(-1)
    size = tokens * (experts + 1)
    weights = weights_SK.new_zeros(size).index_add(0, place_S, weights_SK.reshape(-1))
    chosen = torch.zeros(size, dtype=torch.bool, device=place_S.device).index_fill(0, place_S, True)
    weights_TE, chosen_TE = (x.view(tokens, experts + 1)[:, :experts] for x in (weights, chosen))
    index_TE = torch.arange(experts, device=place_S.device).expand(tokens, -1)
    return Assignment(weights_TE, index_TE.masked_fill(~chosen_TE, experts))
