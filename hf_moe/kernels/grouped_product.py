"""A grouped product over rows: out[r] = a[r] W_e (+ b_e) for the rows r of each expert e."""

import torch
import triton
import triton.language as tl

from .layer import Experts
from .routing_metadata import Routing
from .tile_loads import (
    described,
    locate,
    low_rank,
    operand,
    rows_tile,
    split_columns,
    store_tile,
    weight_tile,
    with_added,
)


@triton.jit
def product_kernel(
    a,  # rows [S, depth]
    w,  # [E, columns, depth] if W_LAST, else [E, depth, columns]
    bias,  # [E, columns]
    low,  # rows [S, RANK]
    factor,  # [E, columns, RANK]
    out,  # rows [S, columns]
    offsets,
    tiles,
    num_experts,
    depth_size,
    col_size,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,  # 0: no low-rank part
    PADDED: tl.constexpr,
    A_TMA: tl.constexpr,
    W_LAST: tl.constexpr,
    W_TMA: tl.constexpr,
    OUT_TMA: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    row_tiles, col_tiles = tl.load(offsets + 2 * num_experts + 1), tl.cdiv(col_size, COLS)
    for program in tl.range(tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0), flatten=FLATTEN):
        row_tile, col_tile = locate(program, row_tiles, col_tiles, GROUP)
        expert = tl.load(tiles + 2 * row_tile)
        row, col = row_tile * ROWS, col_tile * COLS
        sources = (row + tl.arange(0, ROWS)).to(tl.int64)

        acc = tl.zeros([ROWS, COLS], tl.float32)
        for depth in range(0, depth_size, DEPTH):
            left = rows_tile(a, row, sources, depth, depth_size, A_TMA, EVEN, DEPTH)
            right = weight_tile(w, expert, depth, col, depth_size, col_size, W_LAST, W_TMA, DEPTH, COLS)
            acc = tl.dot(left, right, acc, input_precision=PRECISION)

        cols = col + tl.arange(0, COLS)
        acc = with_added(acc, bias, low, factor, sources * RANK, expert, cols, col_size, HAS_BIAS, RANK, PADDED)
        parts = split_columns(acc, PARTS)
        for part in tl.static_range(PARTS):
            tile = parts[part].to(a.dtype if A_TMA else a.dtype.element_ty)
            store_tile(out, tile, row, col + part * (COLS // PARTS), col_size, OUT_TMA)


def product(
    a, weight, bias, last: bool, experts: Experts, routing: Routing, low=None, factor=None, kernel: str = "product"
) -> torch.Tensor:
    """Rows a[r] W_e + b_e; W_e is summed over its last axis if `last`. Plus low[r] factor_e^T, of rows low (rank) and
    factor [E, columns, rank]. `kernel`: whose tiles."""
    columns = weight.shape[1 if last else 2]
    out = experts.rows(routing, columns, a)
    grid, w, options = experts.product(kernel, weight, last, columns, routing)
    width = options["COLS"] // options["PARTS"]
    product_kernel[grid](
        operand(a, options["ROWS"], options["DEPTH"]),
        w,
        bias,
        low,
        factor,
        operand(out, options["ROWS"], width),
        routing.offsets,
        routing.tiles,
        depth_size=a.shape[1],
        col_size=columns,
        HAS_BIAS=bias is not None,
        **low_rank(factor),
        A_TMA=described(a, options["DEPTH"]),
        OUT_TMA=described(out, width),
        **options,
    )
    return out
