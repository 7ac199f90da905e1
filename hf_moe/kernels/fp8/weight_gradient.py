"""Gradient of a grouped product's weight in FP8: out_e = sum over the rows r of expert e of left[:, r] right[:, r]^T.

The rows are the summed axis: both sides are in tiles of 128 of them, which no two experts share. Filling is zero.
"""

import torch
import triton
import triton.language as tl

from ..layer import Experts
from ..routing_metadata import Routing
from ..tile_loads import described, locate, operand
from .format import BLOCK, Tiles
from .launch import launch


@triton.jit
def turned_tile(side, col, row, size, rows, TMA: tl.constexpr):
    """[128 columns, 128 rows] of a side [size, rows] from (col, row) on."""
    if TMA:
        tile = side.load([col, row])
    else:
        cols, within = col + tl.arange(0, 128), row + tl.arange(0, 128)
        pointers = side + cols.to(tl.int64)[:, None] * rows + within[None, :]
        tile = tl.load(pointers, mask=(cols < size)[:, None], other=0.0)
    return tile


@triton.jit
def weight_gradient_kernel(
    left,  # [M, R]
    left_scales,  # [blocks of R, M]
    right,  # [N, R]
    right_scales,  # [blocks of R, N]
    out,  # [E, M, N]
    offsets,
    num_experts,
    M,
    N,
    R,
    LEFT_TMA: tl.constexpr,
    RIGHT_TMA: tl.constexpr,
    OUT_TMA: tl.constexpr,
    HALVES: tl.constexpr,  # 1, or 2: twice as many columns, in two sums
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    m_tiles, n_tiles = tl.cdiv(M, 128), tl.cdiv(N, 128 * HALVES)
    tiles = m_tiles * n_tiles
    for program in tl.range(tl.program_id(0), num_experts * tiles, tl.num_programs(0), flatten=FLATTEN):
        expert = program // tiles
        m_tile, n_tile = locate(program % tiles, m_tiles, n_tiles, GROUP)
        m, n = m_tile * 128, n_tile * 128 * HALVES
        first = tl.load(offsets + num_experts + 1 + expert)
        last = tl.load(offsets + num_experts + 2 + expert)
        ms, ns = m + tl.arange(0, 128), n + tl.arange(0, 128)

        acc = tl.zeros([128, 128], tl.float32)
        right_acc = tl.zeros([128, 128], tl.float32)
        for block in range(first, last):
            a = turned_tile(left, m, block * 128, M, R, LEFT_TMA)
            a_scale = tl.load(left_scales + block * M + ms, mask=ms < M, other=0.0)[:, None]
            at = right_scales + block * N + ns
            b = turned_tile(right, n, block * 128, N, R, RIGHT_TMA).T
            acc += tl.dot(a, b) * a_scale * tl.load(at, mask=ns < N, other=0.0)[None, :]
            if HALVES == 2:
                b = turned_tile(right, n + 128, block * 128, N, R, RIGHT_TMA).T
                right_acc += tl.dot(a, b) * a_scale * tl.load(at + 128, mask=ns + 128 < N, other=0.0)[None, :]
        store_gradient(out, acc, expert, m, n, M, N, OUT_TMA)
        if HALVES == 2:
            store_gradient(out, right_acc, expert, m, n + 128, M, N, OUT_TMA)


@triton.jit
def store_gradient(out, tile, expert, m, n, M, N, TMA: tl.constexpr):
    if TMA:
        out.store([expert, m, n], tile.to(out.dtype).reshape(1, 128, 128))
    else:
        rows, cols = m + tl.arange(0, 128), n + tl.arange(0, 128)
        places = (expert.to(tl.int64) * M + rows[:, None]) * N + cols[None, :]
        tl.store(out + places, tile.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])


def weight_gradient(left: Tiles, right: Tiles, dtype: torch.dtype, experts: Experts, routing: Routing) -> torch.Tensor:
    """[E, M, N] in `dtype` from left [M, rows] and right [N, rows], both zero where filling."""
    (M, rows), N = left.codes.shape, len(right.codes)
    out = left.codes.new_empty(experts.num_experts, M, N, dtype=dtype)
    grid, options = launch("weight_gradient", experts.num_experts * triton.cdiv(M, BLOCK), N, out.device)
    weight_gradient_kernel[grid](
        operand(left.codes, BLOCK, BLOCK),
        left.scales,
        operand(right.codes, BLOCK, BLOCK),
        right.scales,
        operand(out, 1, BLOCK, BLOCK),
        routing.offsets,
        num_experts=experts.num_experts,
        M=M,
        N=N,
        R=rows,
        LEFT_TMA=described(left.codes, BLOCK),
        RIGHT_TMA=described(right.codes, BLOCK),
        OUT_TMA=described(out, BLOCK),
        **options,
    )
    return out
