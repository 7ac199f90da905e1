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
from .tile_loads import locate, rows_tile, weight_tile


@triton.jit
def down_backward_kernel(
    grad,  # [T, D]
    w,  # [E, I, D] if W_LAST, else [E, D, I]
    weights,  # [T, K]
    hidden,  # [S, U]
    grad_hidden,  # [S, U]
    weighted,  # [S, I]: w_s A_s
    scores,  # [S, column tiles] float32: <d_s, A_s> over the tile's columns
    slot_of_row,
    offsets,
    tiles,
    row_tiles,
    num_experts,
    D,
    INNER,
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    NEED_HIDDEN: tl.constexpr,
    NEED_WEIGHTED: tl.constexpr,
    W_LAST: tl.constexpr,
    W_TMA: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    col_tiles = tl.cdiv(INNER, COLS)
    row_tile, col_tile = locate(tl.program_id(0), row_tiles, col_tiles, GROUP)
    expert = tl.load(tiles + 2 * row_tile)
    if expert >= num_experts:
        return
    first = tl.load(tiles + 2 * row_tile + 1)
    end = tl.load(offsets + expert + 1)
    rows = first + tl.arange(0, ROWS)
    inside = rows < end
    slots = tl.load(slot_of_row + rows, mask=inside, other=0)
    tokens = (slots // TOP_K).to(tl.int64)
    col = col_tile * COLS

    acc = tl.zeros([ROWS, COLS], tl.float32)
    for depth in range(0, D, DEPTH):
        a = rows_tile(grad, tokens, 0, depth, D, D, False, EVEN, DEPTH)
        b = weight_tile(w, expert, depth, col, D, INNER, W_LAST, W_TMA, DEPTH, COLS)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)

    cols = col + tl.arange(0, COLS)
    kept = inside[:, None] & (cols < INNER)[None, :]
    up_size = 2 * INNER if GATED else INNER
    places = rows.to(tl.int64)[:, None]
    at = places * up_size + cols[None, :]
    weight = tl.load(weights + slots, mask=inside, other=0.0).to(tl.float32)[:, None]
    gate = tl.load(hidden + at, mask=kept, other=0.0).to(tl.float32)
    value, slope = ACTIVATION(gate)
    if GATED:
        up = tl.load(hidden + INNER + at, mask=kept, other=0.0).to(tl.float32)
        if NEED_HIDDEN:
            tl.store(grad_hidden + INNER + at, (weight * acc * value).to(grad_hidden.dtype.element_ty), mask=kept)
        slope *= up
        value *= up
    if NEED_HIDDEN:
        tl.store(grad_hidden + at, (weight * acc * slope).to(grad_hidden.dtype.element_ty), mask=kept)
    if NEED_WEIGHTED:
        tl.store(weighted + places * INNER + cols[None, :], (weight * value).to(weighted.dtype.element_ty), mask=kept)
    tl.store(scores + rows.to(tl.int64) * col_tiles + col_tile, tl.sum(acc * value, 1), mask=inside)


def down_backward(grad, down, weights, hidden, experts: Experts, routing: Routing, need_hidden: bool, need_down: bool):
    """Gradient of the up-projection [S, U], weighted activations [S, I], parts of the weights' gradient [S, .]."""
    slots = len(hidden)
    grid, w, options = experts.product("down_backward", down, experts.transposed, experts.inner, routing)
    grad_hidden = hidden.new_empty(slots if need_hidden else 0, experts.width)
    weighted = hidden.new_empty(slots if need_down else 0, experts.inner)
    scores = hidden.new_empty(slots, triton.cdiv(experts.inner, options["COLS"]), dtype=torch.float32)
    down_backward_kernel[grid](
        grad,
        w,
        weights,
        hidden,
        grad_hidden,
        weighted,
        scores,
        routing.slot_of_row,
        routing.offsets,
        routing.tiles,
        D=grad.shape[1],
        INNER=experts.inner,
        NEED_HIDDEN=need_hidden,
        NEED_WEIGHTED=need_down,
        **experts.formula,
        **options,
    )
    return grad_hidden, weighted, scores
