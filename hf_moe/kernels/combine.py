"""From rows back to tokens, each sum in one order and in float32: no atomics, so the same bits every time."""

import torch
import triton
import triton.language as tl

from .layer import Experts
from .routing_metadata import Routing


@triton.jit
def combine_kernel(
    rows,  # rows [S, D]
    weights,  # [T, K]
    out,  # [T, D]
    row_of_slot,
    D,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    COLS: tl.constexpr,
):
    """out_t = sum_k w_s rows[row of s], s = t K + k; a slot without a row adds nothing, whatever its weight."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    acc = tl.zeros([COLS], tl.float32)
    for k in tl.range(0, TOP_K, loop_unroll_factor=8):
        slot = token * TOP_K + k
        row = tl.load(row_of_slot + slot).to(tl.int64)
        width = tl.where(row >= 0, D, 0)
        value = tl.load(rows + row * D + cols, mask=cols < width, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.where(row >= 0, tl.load(weights + slot), 0.0).to(tl.float32)
        acc += value
    tl.store(out + token * D + cols, acc.to(out.dtype.element_ty), mask=cols < D)


@triton.jit
def score_kernel(
    scores,  # rows [S, parts] float32
    grad,  # [T, D]
    bias,  # [E, D]
    index,  # [T, K]
    out,  # [T, K]
    row_of_slot,
    num_slots,
    parts,
    D,
    TOP_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SLOTS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Gradient of each weight: the parts of <d_s, A_s>, and <dO_t, b_e> where the down-projection has a bias."""
    slots = tl.program_id(0) * SLOTS + tl.arange(0, SLOTS)
    row = tl.load(row_of_slot + slots, mask=slots < num_slots, other=-1).to(tl.int64)
    here = row >= 0
    acc = tl.zeros([SLOTS], tl.float32)
    for part in range(0, parts):
        acc += tl.load(scores + row * parts + part, mask=here, other=0.0)
    if HAS_BIAS:
        expert = tl.load(index + slots, mask=here, other=0).to(tl.int64)
        token = (slots // TOP_K).to(tl.int64)
        for first in range(0, D, COLS):
            cols = first + tl.arange(0, COLS)
            kept = here[:, None] & (cols < D)[None, :]
            left = tl.load(grad + token[:, None] * D + cols[None, :], mask=kept, other=0.0).to(tl.float32)
            right = tl.load(bias + expert[:, None] * D + cols[None, :], mask=kept, other=0.0).to(tl.float32)
            acc += tl.sum(left * right, 1)
    tl.store(out + slots, acc.to(out.dtype.element_ty), mask=slots < num_slots)


@triton.jit
def bias_gradient_kernel(
    rows,  # rows [S, N], or [T, N] if GATHER
    weights,  # [T, K]
    out,  # [E, N]
    slot_of_row,
    offsets,
    num_experts,
    N,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """out_e = the sum of expert e's rows; if GATHER, of w_s rows[t]."""
    expert = tl.program_id(0)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    start = tl.load(offsets + num_experts + 1 + expert) * ROWS
    end = tl.load(offsets + num_experts + 2 + expert) * ROWS
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(start, end, ROWS):
        places = first + tl.arange(0, ROWS)
        slots = tl.load(slot_of_row + places)
        inside = slots >= 0
        sources = (slots // TOP_K if GATHER else places).to(tl.int64)
        kept = inside[:, None] & (cols < N)[None, :]
        value = tl.load(rows + sources[:, None] * N + cols[None, :], mask=kept, other=0.0).to(tl.float32)
        if GATHER:
            value *= tl.load(weights + slots, mask=inside, other=0.0).to(tl.float32)[:, None]
        acc += value
    tl.store(out + expert.to(tl.int64) * N + cols, tl.sum(acc, 0).to(out.dtype.element_ty), mask=cols < N)


def combine(rows, weights, routing: Routing, top_k: int) -> torch.Tensor:
    """[T, D]: the sum of each token's rows, weighted by `weights` [T, K] unless None."""
    slots, width = routing.row_of_slot.numel(), rows.shape[1]
    out = rows.new_empty(slots // top_k, width)
    cols = min(2048, triton.next_power_of_2(width))
    combine_kernel[(len(out), triton.cdiv(width, cols))](
        rows,
        weights,
        out,
        routing.row_of_slot,
        width,
        TOP_K=top_k,
        WEIGHTED=weights is not None,
        COLS=cols,
        num_warps=max(1, min(8, cols // 256)),
    )
    return out


def score_gradient(scores, grad, bias, index, like, experts: Experts, routing: Routing) -> torch.Tensor:
    """[T, K], in the dtype of `like`."""
    out = torch.empty_like(like)
    slots = 64
    score_kernel[(triton.cdiv(index.numel(), slots),)](
        scores,
        grad,
        bias,
        index,
        out,
        routing.row_of_slot,
        num_slots=index.numel(),
        parts=scores.shape[1],
        D=grad.shape[1],
        TOP_K=experts.top_k,
        HAS_BIAS=bias is not None,
        SLOTS=slots,
        COLS=64,
    )
    return out


def bias_gradient(rows, experts: Experts, routing: Routing, weights=None) -> torch.Tensor:
    """[E, N]: the sum of each expert's rows (N), or of the weighted rows of its tokens [T, N] if `weights`."""
    out = rows.new_empty(experts.num_experts, rows.shape[1])
    bias_gradient_kernel[(experts.num_experts, triton.cdiv(rows.shape[1], 64))](
        rows,
        weights,
        out,
        routing.slot_of_row,
        routing.offsets,
        experts.num_experts,
        rows.shape[1],
        TOP_K=experts.top_k,
        GATHER=weights is not None,
        ROWS=experts.tile,
        COLS=64,
    )
    return out
