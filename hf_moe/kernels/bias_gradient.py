"""Gradient of a bias: the sum of each expert's rows."""

import torch
import triton
import triton.language as tl

from .launch import FUSED
from .layer import Experts
from .routing_metadata import Routing


@triton.jit
def bias_gradient_kernel(
    rows,  # rows [S, N]
    weights,  # [T, K]
    out,  # [E, N]
    slot_of_row,
    offsets,
    num_experts,
    N,
    WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    expert = tl.program_id(0)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    start = tl.load(offsets + num_experts + 1 + expert) * ROWS
    end = tl.load(offsets + num_experts + 2 + expert) * ROWS
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(start, end, ROWS):
        places = first + tl.arange(0, ROWS)
        pointers = rows + places.to(tl.int64)[:, None] * N + cols[None, :]
        value = tl.load(pointers, mask=(cols < N)[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            slots = tl.load(slot_of_row + places)
            value *= tl.load(weights + slots, mask=slots >= 0, other=0.0).to(tl.float32)[:, None]
        acc += value
    tl.store(out + expert.to(tl.int64) * N + cols, tl.sum(acc, 0).to(out.dtype.element_ty), mask=cols < N)


def bias_gradient(rows: torch.Tensor, experts: Experts, routing: Routing, weights=None) -> torch.Tensor:
    """[E, N]: the sum of each expert's rows (N), times their slots' `weights` [T, K] unless None."""
    width = rows.shape[1]
    out = rows.new_empty(experts.num_experts, width)
    bias_gradient_kernel[(experts.num_experts, triton.cdiv(width, 64))](
        rows,
        weights,
        out,
        routing.slot_of_row,
        routing.offsets,
        experts.num_experts,
        width,
        WEIGHTED=weights is not None,
        ROWS=experts.tile,
        COLS=64,
        **FUSED,
    )
    return out
