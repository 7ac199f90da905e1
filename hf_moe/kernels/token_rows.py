"""From tokens to rows and back; each sum in one order and in float32: no atomics, so the same bits every time."""

import torch
import triton
import triton.language as tl

from .launch import FUSED
from .layer import Experts
from .routing_metadata import Routing
from .tiles import pass_rows


@triton.jit
def gather_kernel(
    tokens,  # [T, D]
    out,  # rows [S, D]
    row_of_slot,
    offsets,
    num_experts,
    D,
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Each row its token's values, which are read once for all its rows; filling rows are zero."""
    program = tl.program_id(0)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    if program < num_experts:  # the filling of an expert
        count = tl.load(offsets + program + 1) - tl.load(offsets + program)
        start = tl.load(offsets + num_experts + 1 + program) * TILE + count
        end = tl.load(offsets + num_experts + 2 + program) * TILE
        for first in range(start, end, ROWS):
            rows = (first + tl.arange(0, ROWS))[:, None]
            at = out + rows.to(tl.int64) * D + cols[None, :]
            tl.store(at, tl.zeros([ROWS, COLS], out.dtype.element_ty), mask=(rows < end) & (cols < D)[None, :])
    else:
        token = (program - num_experts).to(tl.int64)
        value = tl.load(tokens + token * D + cols, mask=cols < D)
        for k in tl.range(0, TOP_K, loop_unroll_factor=8):
            row = tl.load(row_of_slot + token * TOP_K + k).to(tl.int64)
            tl.store(out + row * D + cols, value, mask=cols < tl.where(row >= 0, D, 0))


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


def columns(width: int) -> int:
    """Columns of one program: all, if they are not many."""
    return min(2048, triton.next_power_of_2(width))


def gather(tokens: torch.Tensor, experts: Experts, routing: Routing) -> torch.Tensor:
    """Rows of tokens [T, D]."""
    width = tokens.shape[1]
    out = experts.rows(routing, width, tokens)
    cols = columns(width)
    gather_kernel[(experts.num_experts + len(tokens), triton.cdiv(width, cols))](
        tokens,
        out,
        routing.row_of_slot,
        routing.offsets,
        experts.num_experts,
        width,
        TOP_K=experts.top_k,
        TILE=experts.tile,
        ROWS=pass_rows(tokens.device),
        COLS=cols,
        num_warps=max(1, min(8, cols // 256)),
        **FUSED,
    )
    return out


def combine(rows: torch.Tensor, weights: torch.Tensor | None, experts: Experts, routing: Routing) -> torch.Tensor:
    """[T, D]: the sum of each token's rows, weighted by `weights` [T, K] unless None."""
    width = rows.shape[1]
    out = rows.new_empty(routing.row_of_slot.numel() // experts.top_k, width)
    cols = columns(width)
    combine_kernel[(len(out), triton.cdiv(width, cols))](
        rows,
        weights,
        out,
        routing.row_of_slot,
        width,
        TOP_K=experts.top_k,
        WEIGHTED=weights is not None,
        COLS=cols,
        num_warps=max(1, min(8, cols // 256)),
        **FUSED,
    )
    return out
