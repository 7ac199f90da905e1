"""The kernels that quantise; format.py says what they compute."""

import torch
import triton
import triton.language as tl

from .format import BLOCK, CODE, LARGEST, SMALLEST, Blocks, Tiles, up_to_blocks
from .launch import FUSED, PASS_ROWS

LARGEST, SMALLEST = tl.constexpr(LARGEST), tl.constexpr(SMALLEST)


@triton.jit
def scale_of(amax, POWER_OF_TWO: tl.constexpr):
    scale = tl.div_rn(tl.maximum(amax, SMALLEST), LARGEST)
    if POWER_OF_TWO:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def in_tiles(value, axis: tl.constexpr):
    """Codes in float32 of a [128, 128], in tiles along `axis`, and its 128 scales."""
    scale = scale_of(tl.max(tl.abs(value), axis), True)
    factor = tl.div_rn(1.0, scale)  # exact, of a power of two
    return value * tl.expand_dims(factor, axis), scale


@triton.jit
def tiles_kernel(
    x,  # [R, N]
    codes,  # [padded R, N]
    scales,  # [blocks of N, padded R]
    R,
    N,
    padded,
    ROWS: tl.constexpr,
):
    rows, block = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    cols = block * 128 + tl.arange(0, 128)
    at = rows.to(tl.int64)[:, None] * N + cols[None, :]
    wide = (cols < N)[None, :]
    value = tl.load(x + at, mask=(rows < R)[:, None] & wide, other=0.0).to(tl.float32)
    value, scale = in_tiles(value, 1)
    tl.store(codes + at, value.to(codes.dtype.element_ty), mask=wide)
    tl.store(scales + block * padded + rows, scale)


def tiles_of(x: torch.Tensor) -> Tiles:
    """[R, N] in tiles along N."""
    rows, columns = x.shape
    padded = up_to_blocks(rows)
    codes = x.new_empty(padded, columns, dtype=CODE)
    scales = x.new_empty(triton.cdiv(columns, BLOCK), padded, dtype=torch.float32)
    grid = (padded // PASS_ROWS, len(scales))
    tiles_kernel[grid](x, codes, scales, rows, columns, padded, ROWS=PASS_ROWS, num_warps=4, **FUSED)
    return Tiles(codes, scales)


@triton.jit
def blocks_kernel(
    weight,  # [E, M, N]
    codes,  # [E, M, N]
    scales,  # [E, blocks of M, blocks of N]
    turned,  # [E, N, M]
    turned_scales,  # [E, blocks of N, blocks of M]
    M,
    N,
):
    expert, m, n = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m_blocks, n_blocks = tl.num_programs(1), tl.num_programs(2)
    within = tl.arange(0, 128)
    rows, cols = m * 128 + within, n * 128 + within
    start = expert.to(tl.int64) * M * N
    at, kept = rows[:, None] * N + cols[None, :], (rows < M)[:, None] & (cols < N)[None, :]
    value = tl.load(weight + start + at, mask=kept, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.max(tl.abs(value), 1), 0), False)
    code = tl.div_rn(value, tl.zeros_like(value) + scale).to(codes.dtype.element_ty)
    tl.store(codes + start + at, code, mask=kept)
    at, kept = cols[:, None] * M + rows[None, :], (cols < N)[:, None] & (rows < M)[None, :]
    tl.store(turned + start + at, code.T, mask=kept)
    tl.store(scales + (expert * m_blocks + m) * n_blocks + n, scale)
    tl.store(turned_scales + (expert * n_blocks + n) * m_blocks + m, scale)


def blocks_of(weight: torch.Tensor) -> tuple[Blocks, Blocks]:
    """Matrices [E, M, N] in blocks, and their transposes [E, N, M]: tensor cores sum E4M3 along last axes alone."""
    experts, rows, columns = weight.shape
    grid = (triton.cdiv(rows, BLOCK), triton.cdiv(columns, BLOCK))
    ours = Blocks(torch.empty_like(weight, dtype=CODE), weight.new_empty(experts, *grid, dtype=torch.float32))
    turned = Blocks(
        weight.new_empty(experts, columns, rows, dtype=CODE),
        weight.new_empty(experts, *reversed(grid), dtype=torch.float32),
    )
    blocks_kernel[(experts, *grid)](weight, *ours, *turned, rows, columns, num_warps=8, **FUSED)
    return ours, turned
