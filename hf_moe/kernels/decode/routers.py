"""A token's experts in two launches: logits in float32; then scores, choice and weights. Of few tokens in
one, with the norm before the router. A token that nobody reads has none: its indices are E.

Shapes: T tokens, D hidden size, E experts, K experts per token.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .norms import normalized
from .overlap import OVERLAP, last_of, let_next_start, wait_for_last

SOME = tl.constexpr(64)  # experts that each is compared with at once
ROUTER_TILE = 16384  # values of the gate that a program holds
MANY = 64  # tokens; with more, a matrix product reads the weights less often
SCORES = {"softmax_topk": 0, "topk_softmax": 1, "sigmoid_topk": 2}


class Groups(NamedTuple):
    """A token's experts are in `kept` of `count` equal groups: those with the largest sum of the `best` first."""

    count: int
    kept: int
    best: int

    def options(self, experts: int) -> dict[str, int]:
        size = experts // self.count
        blocks = {"BLOCK_G": triton.next_power_of_2(self.count), "BLOCK_S": triton.next_power_of_2(size)}
        return {"GROUPS": self.count, "KEPT": self.kept, "BEST": min(self.best, size), "SIZE": size} | blocks


ALL = Groups(1, 1, 1)  # no limit


@triton.jit
def logits_kernel(
    x_ptr, weight_ptr, logits_ptr, D, E, ROUNDS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr
):
    let_next_start()
    wait_for_last()
    token = tl.program_id(0)
    expert, depth = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_D)
    real = expert < E
    total = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        here = depth + start < D
        x = tl.load(x_ptr + token * D + start + depth, mask=here, other=0.0).to(tl.float32)
        place = weight_ptr + expert[:, None] * D + start + depth[None, :]
        total += x[None, :] * tl.load(place, mask=real[:, None] & here[None, :], other=0.0).to(tl.float32)
    logits = tl.sum(total, axis=1)
    if ROUNDS:
        logits = logits.to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(logits_ptr + token * E + expert, logits, mask=real)


@triton.jit
def scores_of(logits, bias_ptr, expert, real, best, mass, SCORE: tl.constexpr, BIASED: tl.constexpr):
    """The scores of some experts, and what they are chosen by; -inf where there is no expert."""
    scores = tl.sigmoid(logits) if SCORE == 2 else tl.exp(logits - best) / mass
    choice = scores
    if BIASED:
        choice += tl.load(bias_ptr + expert, mask=real, other=0.0)
    return scores, tl.where(real, choice, float("-inf"))


@triton.jit
def ahead_of(choice, expert, theirs, other):
    """How many of others come before each expert: those with more, and of those with as much the earlier ones."""
    ties = (theirs[None, :] == choice[:, None]) & (other[None, :] < expert[:, None])
    return tl.sum(((theirs[None, :] > choice[:, None]) | ties).to(tl.int32), axis=1)


@triton.jit
def kept_groups(
    logits_ptr,
    bias_ptr,
    best,
    mass,
    SCORE: tl.constexpr,
    BIASED: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    BEST: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Whether a token may choose in each group: DeepSeek-V3 (https://arxiv.org/abs/2412.19437), 2.1.2; V2, 2.2.2."""
    group, place = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S)
    expert = group[:, None] * SIZE + place[None, :]
    real = (group < GROUPS)[:, None] & (place < SIZE)[None, :]
    logits = tl.load(logits_ptr + expert, mask=real, other=float("-inf"), cache_modifier=".cg")
    _, choice = scores_of(logits, bias_ptr, expert, real, best, mass, SCORE, BIASED)
    total = tl.max(choice, axis=1)
    if BEST == 2:
        first = tl.min(tl.where(choice == total[:, None], place[None, :], BLOCK_S), axis=1)
        total += tl.max(tl.where(place[None, :] == first[:, None], float("-inf"), choice), axis=1)
    total = tl.where(group < GROUPS, total, float("-inf"))
    return ahead_of(total, group, total, group) < KEPT


@triton.jit
def choose(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    index_ptr,
    read_ptr,
    E,
    K,
    scale,
    SCORE: tl.constexpr,
    BIASED: tl.constexpr,
    NORMED: tl.constexpr,
    MASKED: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    BEST: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token's K experts and their weights, of its E logits; if MASKED none where `read_ptr` points at 0."""
    expert, slot, some = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K), tl.arange(0, SOME)
    real = expert < E
    # Other programs may have written them just now: not from this processor's own cache.
    logits = tl.load(logits_ptr + expert, mask=real, other=float("-inf"), cache_modifier=".cg")
    best = tl.max(logits, axis=0)
    mass = tl.sum(tl.exp(logits - best), axis=0)
    scores, choice = scores_of(logits, bias_ptr, expert, real, best, mass, SCORE, BIASED)
    # An expert's slot is the number of those before it: no search, which would go through the threads K times.
    if KEPT < GROUPS:
        group, place = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S)
        kept = kept_groups(
            logits_ptr, bias_ptr, best, mass, SCORE, BIASED, GROUPS, KEPT, BEST, SIZE, BLOCK_G, BLOCK_S
        ).to(tl.int32)
        own = tl.sum(tl.where(expert[:, None] // SIZE == group[None, :], kept[None, :], 0), axis=1)
        choice = tl.where(own > 0, choice, float("-inf"))
        before = tl.zeros((BLOCK_E,), tl.int32)
        for other_group in range(GROUPS):
            open = tl.sum(tl.where(group == other_group, kept, 0), axis=0)
            other = other_group * SIZE + place
            there = place < tl.where(open > 0, SIZE, 0)
            theirs = tl.load(logits_ptr + other, mask=there, other=float("-inf"), cache_modifier=".cg")
            _, theirs = scores_of(theirs, bias_ptr, other, there, best, mass, SCORE, BIASED)
            before += ahead_of(choice, expert, theirs, other)
    elif BLOCK_E <= SOME:
        before = ahead_of(choice, expert, choice, expert)
    else:
        before = tl.zeros((BLOCK_E,), tl.int32)
        for start in range(0, E, SOME):
            other = start + some
            there = other < E
            theirs = tl.load(logits_ptr + other, mask=there, other=float("-inf"), cache_modifier=".cg")
            _, theirs = scores_of(theirs, bias_ptr, other, there, best, mass, SCORE, BIASED)
            before += ahead_of(choice, expert, theirs, other)
    taken = (before[:, None] == slot[None, :]) & real[:, None]
    chosen = tl.sum(tl.where(taken, expert[:, None], 0), axis=0)
    weights = tl.sum(tl.where(taken, (logits if SCORE == 1 else scores)[:, None], 0.0), axis=0)
    weights = tl.where(slot < K, weights, float("-inf") if SCORE == 1 else 0.0)
    if SCORE == 1:
        exps = tl.exp(weights - tl.max(weights, axis=0))
        weights = exps / tl.sum(exps, axis=0)
    elif NORMED:
        weights = weights / tl.maximum(tl.sum(weights, axis=0), 1.1754943508222875e-38)
    if MASKED:
        chosen = tl.where(tl.load(read_ptr) != 0, chosen, E)
    tl.store(weights_ptr + slot, weights * scale, mask=slot < K)
    tl.store(index_ptr + slot, chosen.to(tl.int64), mask=slot < K)


@triton.jit
def choice_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    index_ptr,
    read_ptr,
    E,
    K,
    scale,
    SCORE: tl.constexpr,
    BIASED: tl.constexpr,
    NORMED: tl.constexpr,
    MASKED: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    BEST: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    let_next_start()
    wait_for_last()
    token = tl.program_id(0).to(tl.int64)
    if MASKED:
        read_ptr += token
    choose(
        logits_ptr + token * E,
        bias_ptr,
        weights_ptr + token * K,
        index_ptr + token * K,
        read_ptr,
        E,
        K,
        scale,
        SCORE,
        BIASED,
        NORMED,
        MASKED,
        GROUPS,
        KEPT,
        BEST,
        SIZE,
        BLOCK_G,
        BLOCK_S,
        BLOCK_E,
        BLOCK_K,
    )


@triton.jit
def normed_route_kernel(
    x_ptr,
    change_ptr,
    norm_ptr,
    gate_ptr,
    bias_ptr,
    sum_ptr,
    normed_ptr,
    logits_ptr,
    weights_ptr,
    index_ptr,
    read_ptr,
    arrived_ptr,
    eps,
    D,
    E,
    K,
    scale,
    SCORE: tl.constexpr,
    BIASED: tl.constexpr,
    NORMED: tl.constexpr,
    MASKED: tl.constexpr,
    ROUNDS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    BEST: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Each program has PART experts of a token; the last one to end chooses among all of them."""
    let_next_start()
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    expert, depth = part * PART + tl.arange(0, PART), tl.arange(0, BLOCK_D)
    here = depth < D
    places = gate_ptr + expert[:, None] * D + depth[None, :]
    gate = tl.load(places, mask=(expert < E)[:, None] & here[None, :], other=0.0)
    norm = tl.load(norm_ptr + depth, mask=here, other=0.0).to(tl.float32)
    wait_for_last()
    x = tl.load(x_ptr + token * D + depth, mask=here, other=0.0).to(tl.float32)
    x += tl.load(change_ptr + token * D + depth, mask=here, other=0.0).to(tl.float32)
    total = x.to(x_ptr.dtype.element_ty)
    normed = normalized(total, norm, D, eps, normed_ptr.dtype.element_ty)
    if part == 0:
        tl.store(sum_ptr + token * D + depth, total, mask=here)
        tl.store(normed_ptr + token * D + depth, normed, mask=here)
    logits = tl.sum(normed.to(tl.float32)[None, :] * gate.to(tl.float32), axis=1)
    if ROUNDS:
        logits = logits.to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(logits_ptr + token * E + expert, logits, mask=expert < E)
    if MASKED:
        read_ptr += token
    if last_of(arrived_ptr + token, tl.num_programs(1)):
        choose(
            logits_ptr + token * E,
            bias_ptr,
            weights_ptr + token * K,
            index_ptr + token * K,
            read_ptr,
            E,
            K,
            scale,
            SCORE,
            BIASED,
            NORMED,
            MASKED,
            GROUPS,
            KEPT,
            BEST,
            SIZE,
            BLOCK_G,
            BLOCK_S,
            BLOCK_E,
            BLOCK_K,
        )


def router_logits(x: torch.Tensor, weight: torch.Tensor, logits: torch.Tensor, rounded: bool) -> None:
    """x W^T in float32: of 16-bit x and W every product is exact in float32, so a sum in float32 is all it takes.

    If `rounded`, to x's dtype, as an ordinary linear layer does.
    """
    (tokens, dim), experts = x.shape, len(weight)
    if tokens > MANY and rounded:
        logits.copy_(torch.mm(x, weight.mT))
    elif tokens > MANY and x.is_cuda and x.dtype == weight.dtype != torch.float32:
        torch.mm(x, weight.mT, out_dtype=torch.float32, out=logits)
    elif tokens > MANY:
        torch.mm(x.float(), weight.float().mT, out=logits)
    else:
        logits_kernel[(tokens, triton.cdiv(experts, 8))](
            x,
            weight,
            logits,
            dim,
            experts,
            ROUNDS=rounded,
            BLOCK_E=8,
            BLOCK_D=min(1024, triton.next_power_of_2(dim)),
            num_warps=4,
            **OVERLAP,
        )


def route(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    router_type: str,
    normed: bool,
    scale: float,
    rounded: bool,
    groups: Groups = ALL,
    token_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [T, E] and weights [T, K] in float32, expert indices [T, K], of x [T, D] and the gate's weight [E, D].

    The choice is made by logits in x's dtype if `rounded`, within `groups`. `token_mask` [T] is 0 for tokens that have
    no experts.
    """
    tokens, experts = len(x), len(weight)
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=x.device)
    index = torch.empty(tokens, top_k, dtype=torch.int64, device=x.device)
    router_logits(x, weight, logits, rounded)
    choice_kernel[(tokens,)](
        logits,
        bias,
        weights,
        index,
        token_mask,
        experts,
        top_k,
        scale,
        SCORE=SCORES[router_type],
        BIASED=bias is not None,
        NORMED=normed,
        MASKED=token_mask is not None,
        **groups.options(experts),
        BLOCK_E=triton.next_power_of_2(experts),
        BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=4,
        **OVERLAP,
    )
    return logits, weights, index


def normed_route(
    x: torch.Tensor,
    change: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    top_k: int,
    router_type: str,
    normed: bool,
    scale: float,
    rounded: bool,
    groups: Groups,
    arrived: torch.Tensor,
    token_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x + change [T, D], its norm, and of that the weights and indices of `route`.

    `arrived` [T] int32 counts programs: zeros, as it is left.
    """
    (tokens, dim), experts = x.shape, len(weight)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, norm_weight.dtype), device=x.device)
    logits = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=x.device)
    index = torch.empty(tokens, top_k, dtype=torch.int64, device=x.device)
    block_d = triton.next_power_of_2(dim)
    part = max(1, min(8, ROUTER_TILE // block_d))
    normed_route_kernel[(tokens, triton.cdiv(experts, part))](
        x,
        change,
        norm_weight,
        weight,
        bias,
        total,
        out,
        logits,
        weights,
        index,
        token_mask,
        arrived,
        eps,
        dim,
        experts,
        top_k,
        scale,
        SCORE=SCORES[router_type],
        BIASED=bias is not None,
        NORMED=normed,
        MASKED=token_mask is not None,
        **groups.options(experts),
        ROUNDS=rounded,
        BLOCK_E=triton.next_power_of_2(experts),
        BLOCK_K=triton.next_power_of_2(top_k),
        PART=part,
        BLOCK_D=block_d,
        num_warps=4,
        **OVERLAP,
    )
    return total, out, weights, index
