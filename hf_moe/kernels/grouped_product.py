"""A grouped product over sorted rows: out[r] = a[r] W_e (+ b_e) for the rows r of each expert e."""

import torch
import triton
import triton.language as tl

from .layer import Experts
from .routing_metadata import Routing
from .tile_loads import described, locate, operand, rows_tile, weight_tile


@triton.jit
def product_kernel(
    a,  # [S, depth]
    w,  # [E, columns, depth] if W_LAST, else [E, depth, columns]
    bias,  # [E, columns]
    out,  # [S, columns]
    offsets,
    tiles,
    row_tiles,
    num_experts,
    depth_size,
    col_size,
    HAS_BIAS: tl.constexpr,
    A_TMA: tl.constexpr,
    W_LAST: tl.constexpr,
    W_TMA: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tile, col_tile = locate(tl.program_id(0), row_tiles, tl.cdiv(col_size, COLS), GROUP)
    expert = tl.load(tiles + 2 * row_tile)
    if expert >= num_experts:
        return
    first = tl.load(tiles + 2 * row_tile + 1)
    end = tl.load(offsets + expert + 1)
    rows = first + tl.arange(0, ROWS)
    col = col_tile * COLS
    sources = tl.minimum(rows, end - 1).to(tl.int64)

    acc = tl.zeros([ROWS, COLS], tl.float32)
    for depth in range(0, depth_size, DEPTH):
        left = rows_tile(a, sources, first, depth, depth_size, depth_size, A_TMA, EVEN, DEPTH)
        right = weight_tile(w, expert, depth, col, depth_size, col_size, W_LAST, W_TMA, DEPTH, COLS)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)

    cols = col + tl.arange(0, COLS)
    if HAS_BIAS:
        acc += tl.load(bias + expert * col_size + cols, mask=cols < col_size, other=0.0).to(tl.float32)[None, :]
    kept = (rows < end)[:, None] & (cols < col_size)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * col_size + cols[None, :], acc.to(out.dtype.element_ty), mask=kept)


def product(name: str, a, weight, bias, last: bool, experts: Experts, routing: Routing) -> torch.Tensor:
    """out[r] = a[r] W_e + b_e, [S, columns]; W_e is summed over its last axis if `last`."""
    columns = weight.shape[1 if last else 2]
    out = a.new_empty(len(a), columns)
    grid, w, options = experts.product(name, weight, last, columns, routing)
    block = [options["ROWS"], options["DEPTH"]]
    product_kernel[grid](
        operand(a, block),
        w,
        bias,
        out,
        routing.offsets,
        routing.tiles,
        depth_size=a.shape[1],
        col_size=columns,
        HAS_BIAS=bias is not None,
        A_TMA=described(a, block),
        **options,
    )
    return out
