"""Gradient of a grouped product's weight: out_e = sum over the rows r of expert e of left[r]^T right[r].

Filling rows need no mask: they are zero on both sides.
"""

import torch
import triton
import triton.language as tl

from .layer import Experts
from .routing_metadata import Routing
from .tile_loads import described, locate, operand, precision
from .tiles import processors, tiles


@triton.jit
def side_tile(side, row, col, size, TMA: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Columns from `col` of an operand, for the rows from `row` on."""
    if TMA:
        tile = side.load([row, col])
    else:
        rows, cols = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
        pointers = side + rows.to(tl.int64)[:, None] * size + cols[None, :]
        tile = tl.load(pointers) if EVEN else tl.load(pointers, mask=(cols < size)[None, :], other=0.0)
    return tile


@triton.jit
def weight_gradient_kernel(
    left,  # rows [S, M]
    right,  # rows [S, N]
    out,  # [E, M, N]
    offsets,
    num_experts,
    M,
    N,
    LEFT_TMA: tl.constexpr,
    RIGHT_TMA: tl.constexpr,
    OUT_TMA: tl.constexpr,
    LEFT_EVEN: tl.constexpr,
    RIGHT_EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    m_tiles, n_tiles = tl.cdiv(M, ROWS), tl.cdiv(N, COLS)
    tiles = m_tiles * n_tiles
    for program in tl.range(tl.program_id(0), num_experts * tiles, tl.num_programs(0), flatten=FLATTEN):
        expert = program // tiles
        m_tile, n_tile = locate(program % tiles, m_tiles, n_tiles, GROUP)
        m, n = m_tile * ROWS, n_tile * COLS
        count = tl.load(offsets + expert + 1) - tl.load(offsets + expert)
        start = tl.load(offsets + num_experts + 1 + expert) * TILE

        acc = tl.zeros([ROWS, COLS], tl.float32)
        for row in range(start, start + count, DEPTH):
            a = side_tile(left, row, m, M, LEFT_TMA, LEFT_EVEN, DEPTH, ROWS)
            b = side_tile(right, row, n, N, RIGHT_TMA, RIGHT_EVEN, DEPTH, COLS)
            acc = tl.dot(a.T, b, acc, input_precision=PRECISION)

        tile = acc.to(out.dtype if OUT_TMA else out.dtype.element_ty)
        if OUT_TMA:
            out.store([expert, m, n], tile.reshape(1, ROWS, COLS))
        else:
            rows, cols = m + tl.arange(0, ROWS), n + tl.arange(0, COLS)
            places = (expert.to(tl.int64) * M + rows[:, None]) * N + cols[None, :]
            tl.store(out + places, tile, mask=(rows < M)[:, None] & (cols < N)[None, :])


def weight_gradient(left, right, experts: Experts, routing: Routing, dtype: torch.dtype | None = None) -> torch.Tensor:
    """[E, M, N] in `dtype`, or the rows', from the rows left (M) and right (N), both zero where filling."""
    M, N, dtype = left.shape[1], right.shape[1], dtype or left.dtype
    out = left.new_empty(experts.num_experts, M, N, dtype=dtype)
    chosen = tiles("weight_gradient", experts.tile, left.dtype, left.device)
    chosen["DEPTH"] = min(chosen["DEPTH"], experts.tile)  # beyond its tile a row is another expert's
    m, n = chosen["ROWS"], chosen["COLS"]
    out_tma = dtype == left.dtype and described(out, n)  # a wider tile has no room beside the operands'
    programs = experts.num_experts * triton.cdiv(M, m) * triton.cdiv(N, n)
    weight_gradient_kernel[(min(programs, chosen.pop("per_processor") * processors(left.device)),)](
        operand(left, chosen["DEPTH"], m),
        operand(right, chosen["DEPTH"], n),
        operand(out, 1, m, n) if out_tma else out,
        routing.offsets,
        num_experts=experts.num_experts,
        M=M,
        N=N,
        LEFT_TMA=described(left, m),
        RIGHT_TMA=described(right, n),
        OUT_TMA=out_tma,
        LEFT_EVEN=M % m == 0,
        RIGHT_EVEN=N % n == 0,
        PRECISION=precision(left.dtype),
        TILE=experts.tile,
        **chosen,
    )
    return out
