"""Gradient of a grouped product's weight: out_e = sum over the rows r of expert e of left[r]^T right[r]."""

import torch
import triton
import triton.language as tl

from .layer import Experts, precision
from .routing_metadata import Routing
from .tile_loads import described, locate, operand
from .tiles import tiles


@triton.jit
def side_tile(
    side,
    slot_of_row,
    first,
    end,
    col,
    size,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    TMA: tl.constexpr,
    WHOLE: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Rows first to first + ROWS of one operand, by token if GATHER; zero from row `end` on unless WHOLE."""
    rows = first + tl.arange(0, ROWS)
    if TMA:
        tile = side.load([first, col])
        if not WHOLE:  # what lies beyond is another expert's, or was never written
            tile = tl.where((rows < end)[:, None], tile, tl.zeros_like(tile))
    else:
        cols = col + tl.arange(0, COLS)
        inside = rows < end
        if GATHER:
            if WHOLE:
                rows = tl.load(slot_of_row + rows) // TOP_K
            else:
                rows = tl.load(slot_of_row + rows, mask=inside, other=0) // TOP_K
        pointers = side + rows.to(tl.int64)[:, None] * size + cols[None, :]
        if WHOLE and EVEN:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=inside[:, None] & (cols < size)[None, :], other=0.0)
    return tile


@triton.jit
def weight_gradient_kernel(
    left,  # [S or T, M]
    right,  # [S or T, N]
    out,  # [E, M, N]
    slot_of_row,
    offsets,
    M,
    N,
    TOP_K: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    LEFT_TMA: tl.constexpr,
    RIGHT_TMA: tl.constexpr,
    LEFT_EVEN: tl.constexpr,
    RIGHT_EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    m_tiles, n_tiles = tl.cdiv(M, ROWS), tl.cdiv(N, COLS)
    expert = tl.program_id(0) // (m_tiles * n_tiles)
    m_tile, n_tile = locate(tl.program_id(0) % (m_tiles * n_tiles), m_tiles, n_tiles, GROUP)
    start, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    row, col = m_tile * ROWS, n_tile * COLS
    whole = start + (end - start) // DEPTH * DEPTH

    acc = tl.zeros([ROWS, COLS], tl.float32)
    for first in range(start, whole, DEPTH):
        a = side_tile(
            left, slot_of_row, first, end, row, M, TOP_K, GATHER_LEFT, LEFT_TMA, True, LEFT_EVEN, DEPTH, ROWS
        )
        b = side_tile(
            right, slot_of_row, first, end, col, N, TOP_K, GATHER_RIGHT, RIGHT_TMA, True, RIGHT_EVEN, DEPTH, COLS
        )
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)
    if whole < end:
        a = side_tile(left, slot_of_row, whole, end, row, M, TOP_K, GATHER_LEFT, LEFT_TMA, False, False, DEPTH, ROWS)
        b = side_tile(
            right, slot_of_row, whole, end, col, N, TOP_K, GATHER_RIGHT, RIGHT_TMA, False, False, DEPTH, COLS
        )
        acc = tl.dot(a.T, b, acc, input_precision=PRECISION)

    rows, cols = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
    places = expert.to(tl.int64) * M * N + rows[:, None].to(tl.int64) * N + cols[None, :]
    kept = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(out + places, acc.to(out.dtype.element_ty), mask=kept)


def weight_gradient(left, right, by_token, experts: Experts, routing: Routing) -> torch.Tensor:
    """[E, M, N] from left [., M] and right [., N]; the one that is `by_token` is gathered in the load."""
    M, N = left.shape[1], right.shape[1]
    out = left.new_empty(experts.num_experts, M, N)
    chosen = tiles("weight_gradient", experts.rows, left.dtype, left.device)
    blocks = [chosen["DEPTH"], chosen["ROWS"]], [chosen["DEPTH"], chosen["COLS"]]
    gathered = left is by_token, right is by_token
    left_tma = not gathered[0] and described(left, blocks[0])
    right_tma = not gathered[1] and described(right, blocks[1])
    programs = experts.num_experts * triton.cdiv(M, chosen["ROWS"]) * triton.cdiv(N, chosen["COLS"])
    weight_gradient_kernel[(programs,)](
        operand(left, blocks[0]) if left_tma else left,
        operand(right, blocks[1]) if right_tma else right,
        out,
        routing.slot_of_row,
        routing.offsets,
        M,
        N,
        TOP_K=experts.top_k,
        GATHER_LEFT=gathered[0],
        GATHER_RIGHT=gathered[1],
        LEFT_TMA=left_tma,
        RIGHT_TMA=right_tma,
        LEFT_EVEN=M % chosen["ROWS"] == 0,
        RIGHT_EVEN=N % chosen["COLS"] == 0,
        PRECISION=precision(left.dtype),
        **chosen,
    )
    return out
