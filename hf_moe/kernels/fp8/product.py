"""A grouped product over rows in FP8: out[r] = a[r] W_e^T for the rows r of each expert e.

After each 128 numbers of the summed axis the tensor core's sum, of fewer bits than float32, is scaled and added to one
in float32 (V3, 3.3.2): there the scales change, too.
"""

import torch
import triton
import triton.language as tl

from ..layer import Experts
from ..routing_metadata import Routing
from ..tile_loads import described, locate, low_rank, matrix_tile, operand, rows_tile, store_tile, with_added
from .format import BLOCK, Blocks, Tiles
from .launch import launch


@triton.jit
def product_kernel(
    a,  # [R, depth]: rows, or tokens that are gathered
    a_scales,  # [blocks of depth, R]
    w,  # [E, columns, depth]
    w_scales,  # [E, blocks of columns, blocks of depth]
    low,  # rows [S, RANK]
    factor,  # [E, columns, RANK]
    out,  # rows [S, columns]
    slot_of_row,
    offsets,
    tiles,
    num_experts,
    a_rows,  # R
    depth_size,
    col_size,
    TOP_K: tl.constexpr,
    RANK: tl.constexpr,  # 0: no low-rank part
    PADDED: tl.constexpr,
    GATHERED: tl.constexpr,
    A_TMA: tl.constexpr,
    W_TMA: tl.constexpr,
    OUT_TMA: tl.constexpr,
    EVEN: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    row_tiles, col_tiles = tl.load(offsets + 2 * num_experts + 1), tl.cdiv(col_size, 128)
    depth_blocks = tl.cdiv(depth_size, 128)
    for program in tl.range(tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0), flatten=FLATTEN):
        row_tile, col_tile = locate(program, row_tiles, col_tiles, GROUP)
        expert = tl.load(tiles + 2 * row_tile)
        row, col = row_tile * 128, col_tile * 128
        sources = row + tl.arange(0, 128)
        if GATHERED:
            sources = tl.maximum(tl.load(slot_of_row + sources), 0) // TOP_K
        wide = sources.to(tl.int64)
        at = w_scales + (expert * col_tiles + col_tile) * depth_blocks

        acc = tl.zeros([128, 128], tl.float32)
        for block in range(0, depth_blocks):
            depth = block * 128
            left = rows_tile(a, row, wide, depth, depth_size, A_TMA, EVEN, 128)
            scale = tl.load(a_scales + block * a_rows + sources)
            b = matrix_tile(w, expert, col, depth, col_size, depth_size, W_TMA, 128, 128).T
            acc += tl.dot(left, b) * (scale * tl.load(at + block))[:, None]
        if RANK > 0:
            starts, cols = (row + tl.arange(0, 128)).to(tl.int64) * RANK, col + tl.arange(0, 128)
            acc = with_added(acc, None, low, factor, starts, expert, cols, col_size, False, RANK, PADDED)
        kind = out.dtype if OUT_TMA else out.dtype.element_ty
        store_tile(out, acc.to(kind), row, col, col_size, OUT_TMA)


def product(
    a: Tiles,
    w: Blocks,
    dtype: torch.dtype,
    experts: Experts,
    routing: Routing,
    gathered: bool = False,
    low: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows a[r] W_e^T in `dtype`, plus low[r] factor_e^T; the rows of a are tokens if `gathered`."""
    columns, depth = w.codes.shape[1:]
    out = a.codes.new_empty(experts.row_tiles(routing) * experts.tile, columns, dtype=dtype)
    grid, options = launch("product", experts.row_tiles(routing), columns, a.codes.device)
    product_kernel[grid](
        a.codes if gathered else operand(a.codes, BLOCK, BLOCK),
        a.scales,
        operand(w.codes, 1, BLOCK, BLOCK),
        w.scales,
        low,
        factor,
        operand(out, BLOCK, BLOCK),
        routing.slot_of_row,
        routing.offsets,
        routing.tiles,
        experts.num_experts,
        a.scales.shape[1],
        depth_size=depth,
        col_size=columns,
        TOP_K=experts.top_k,
        **low_rank(factor),
        GATHERED=gathered,
        A_TMA=not gathered and described(a.codes, BLOCK),
        W_TMA=described(w.codes, BLOCK),
        OUT_TMA=described(out, BLOCK),
        EVEN=depth % BLOCK == 0,
        **options,
    )
    return out
