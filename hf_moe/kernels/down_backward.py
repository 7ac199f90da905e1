"""Backward of the down-projection and of the activation in one grouped product.

With A = act(gate) up and out_t = sum_k w_s (A_s W_e^T + b_e), the product d_s = dO_t W_e gives in its epilogue the
gradient of the weight, w'_s = <d_s, A_s>, so that the down-projection's output need not be kept (SonicMoE,
https://arxiv.org/abs/2512.14080), the gradient of the up-projection from w_s d_s, and w_s A_s for that of W_down.
"""

import torch
import triton
import triton.language as tl

from .layer import Experts
from .routing_metadata import Routing
from .tile_loads import described, locate, operand, rows_tile, split_columns, weight_tile


@triton.jit
def down_backward_kernel(
    grad,  # [T, D], or rows [S, D] if GRAD_TMA
    w,  # [E, I, D] if W_LAST, else [E, D, I]
    weights,  # [T, K]
    hidden,  # places [S, 2, I] if GATED, else [S, 1, I]
    grad_hidden,  # rows [S, 2 or 1, I]
    weighted,  # rows [S, 1, I]: w_s A_s
    scores,  # rows [S, column tiles] float32: <d_s, A_s> over the tile's columns
    slot_of_row,
    offsets,
    tiles,
    num_experts,
    D,
    INNER,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    NEED_HIDDEN: tl.constexpr,
    NEED_WEIGHTED: tl.constexpr,
    GRAD_TMA: tl.constexpr,
    W_LAST: tl.constexpr,
    W_TMA: tl.constexpr,
    INNER_TMA: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    PARTS: tl.constexpr,
    FLATTEN: tl.constexpr,
    SPECIALIZE: tl.constexpr,
):
    row_tiles, col_tiles = tl.load(offsets + 2 * num_experts + 1), tl.cdiv(INNER, COLS)
    for program in tl.range(
        tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0), flatten=FLATTEN, warp_specialize=SPECIALIZE
    ):
        row_tile, col_tile = locate(program, row_tiles, col_tiles, GROUP)
        expert, place = tl.load(tiles + 2 * row_tile), tl.load(tiles + 2 * row_tile + 1)
        row, col = row_tile * ROWS, col_tile * COLS
        rows = row + tl.arange(0, ROWS)
        tokens = tl.arange(0, ROWS)
        if not GRAD_TMA:
            tokens = (tl.maximum(tl.load(slot_of_row + rows), 0) // TOP_K).to(tl.int64)

        acc = tl.zeros([ROWS, COLS], tl.float32)
        for depth in range(0, D, DEPTH):
            a = rows_tile(grad, row, tokens, depth, D, GRAD_TMA, EVEN, DEPTH)
            b = weight_tile(w, expert, depth, col, D, INNER, W_LAST, W_TMA, DEPTH, COLS)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)

        slots = tl.load(slot_of_row + rows)
        weight = tl.load(weights + slots, mask=slots >= 0, other=0.0).to(tl.float32)
        score = tl.zeros([ROWS], tl.float32)
        # By parts, since the epilogue of a whole tile does not fit in the registers.
        parts = split_columns(acc, PARTS)
        for part in tl.static_range(PARTS):
            score += activation_backward(
                parts[part],
                hidden,
                grad_hidden,
                weighted,
                weight,
                slots >= 0,
                place,
                row,
                col + part * (COLS // PARTS),
                INNER,
                ACTIVATION,
                GATED,
                NEED_HIDDEN,
                NEED_WEIGHTED,
                INNER_TMA,
            )
        tl.store(scores + rows.to(tl.int64) * col_tiles + col_tile, score)


@triton.jit
def activation_backward(
    acc,
    hidden,
    grad_hidden,
    weighted,
    weight,
    inside,
    place,
    row,
    col,
    INNER,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    NEED_HIDDEN: tl.constexpr,
    NEED_WEIGHTED: tl.constexpr,
    TMA: tl.constexpr,
):
    """From d_s = acc on some columns: stores both gradients, returns <d_s, A_s> over these columns."""
    HALVES: tl.constexpr = 2 if GATED else 1
    kept = inside[:, None] & (col + tl.arange(0, acc.shape[1]) < INNER)[None, :]
    acc = tl.where(kept, acc, 0.0)
    weight = weight[:, None]
    gate = load_half(hidden, place, 0, col, INNER, kept, HALVES, TMA)
    value, slope = ACTIVATION(gate)
    if GATED:
        up = load_half(hidden, place, 1, col, INNER, kept, HALVES, TMA)
        if NEED_HIDDEN:
            store_half(grad_hidden, weight * acc * value, row, 1, col, INNER, HALVES, TMA)
        slope *= up
        value *= up
    if NEED_HIDDEN:
        store_half(grad_hidden, weight * acc * slope, row, 0, col, INNER, HALVES, TMA)
    if NEED_WEIGHTED:
        store_half(weighted, weight * value, row, 0, col, INNER, 1, TMA)
    return tl.sum(acc * value, 1)


@triton.jit
def load_half(hidden, place, half, col, INNER, kept, HALVES: tl.constexpr, TMA: tl.constexpr):
    """A tile of the gate's (half 0) or the up-projection's part (half 1) in float32, zero where not kept."""
    if TMA:
        # Rows that are not kept are another expert's, or were never written.
        tile = tl.where(
            kept, hidden.load([place, half, col]).reshape(kept.shape[0], kept.shape[1]).to(tl.float32), 0.0
        )
    else:
        rows, cols = tl.arange(0, kept.shape[0])[:, None], (col + tl.arange(0, kept.shape[1]))[None, :]
        base = hidden + place.to(tl.int64) * (HALVES * INNER) + half * INNER
        tile = tl.load(base + rows * (HALVES * INNER) + cols, mask=kept, other=0.0).to(tl.float32)
    return tile


@triton.jit
def store_half(out, tile, row, half, col, INNER, HALVES: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        out.store([row, half, col], tile.to(out.dtype).reshape(tile.shape[0], 1, tile.shape[1]))
    else:
        rows, cols = tl.arange(0, tile.shape[0])[:, None], (col + tl.arange(0, tile.shape[1]))[None, :]
        base = out + row.to(tl.int64) * (HALVES * INNER) + half * INNER
        tl.store(base + rows * (HALVES * INNER) + cols, tile.to(out.dtype.element_ty), mask=cols < INNER)


def down_backward(
    grad,
    down,
    weights,
    hidden,
    experts: Experts,
    routing: Routing,
    need_hidden: bool,
    need_down: bool,
    gathered: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of the up-projection's gradient (U), of weighted activations (I), and of parts of the weights' gradient."""
    inner, halves = experts.inner, experts.halves
    grid, w, options = experts.product("down_backward", down, experts.transposed, inner, routing)
    grad_hidden = experts.rows(routing, halves * inner, hidden) if need_hidden else hidden.new_empty(0)
    weighted = experts.rows(routing, inner, hidden) if need_down else hidden.new_empty(0)
    scores = experts.rows(routing, triton.cdiv(inner, options["COLS"]), hidden.new_empty(0, dtype=torch.float32))
    block = options["ROWS"], 1, options["COLS"] // options["PARTS"]
    sides = hidden.view(-1, halves, inner), grad_hidden.view(-1, halves, inner), weighted.view(-1, 1, inner)
    tma = options.pop("STORE_TMA") and described(sides[0], block[-1])
    down_backward_kernel[grid](
        operand(grad, options["ROWS"], options["DEPTH"]) if gathered else grad,
        w,
        weights,
        *(operand(side, *block) if tma else side for side in sides),
        scores,
        routing.slot_of_row,
        routing.offsets,
        routing.tiles,
        D=grad.shape[1],
        INNER=inner,
        NEED_HIDDEN=need_hidden,
        NEED_WEIGHTED=need_down,
        GRAD_TMA=gathered and described(grad, options["DEPTH"]),
        INNER_TMA=tma,
        **experts.formula(),
        **options,
    )
    return grad_hidden, weighted, scores
