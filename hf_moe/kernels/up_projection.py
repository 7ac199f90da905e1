"""The first grouped product: x gathered by token inside the load, the activation in the epilogue."""

import torch
import triton
import triton.language as tl

from .layer import Experts
from .routing_metadata import Routing
from .tile_loads import locate, rows_tile, weight_tile


@triton.jit
def up_kernel(
    x,  # [T, D]
    w,  # [E, U, D] if W_LAST, else [E, D, U]; U = 2I (gate, then up) if GATED, else I
    bias,  # [E, U]
    hidden,  # [S, U]: before the activation
    activated,  # [S, I]
    slot_of_row,
    offsets,
    tiles,
    row_tiles,
    num_experts,
    D,
    INNER,  # I
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SAVE: tl.constexpr,
    W_LAST: tl.constexpr,
    W_TMA: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_tile, col_tile = locate(tl.program_id(0), row_tiles, tl.cdiv(INNER, COLS), GROUP)
    expert = tl.load(tiles + 2 * row_tile)
    if expert >= num_experts:
        return
    first = tl.load(tiles + 2 * row_tile + 1)
    end = tl.load(offsets + expert + 1)
    rows = first + tl.arange(0, ROWS)
    inside = rows < end
    tokens = (tl.load(slot_of_row + rows, mask=inside, other=0) // TOP_K).to(tl.int64)
    col = col_tile * COLS
    up_size = 2 * INNER if GATED else INNER

    gate = tl.zeros([ROWS, COLS], tl.float32)
    up = tl.zeros([ROWS, COLS], tl.float32)
    for depth in range(0, D, DEPTH):
        a = rows_tile(x, tokens, 0, depth, D, D, False, EVEN, DEPTH)
        b = weight_tile(w, expert, depth, col, D, up_size, W_LAST, W_TMA, DEPTH, COLS)
        gate = tl.dot(a, b, gate, input_precision=PRECISION)
        if GATED:
            b = weight_tile(w, expert, depth, INNER + col, D, up_size, W_LAST, W_TMA, DEPTH, COLS)
            up = tl.dot(a, b, up, input_precision=PRECISION)

    cols = col + tl.arange(0, COLS)
    kept = inside[:, None] & (cols < INNER)[None, :]
    if HAS_BIAS:
        gate += tl.load(bias + expert * up_size + cols, mask=cols < INNER, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias + expert * up_size + INNER + cols, mask=cols < INNER, other=0.0).to(tl.float32)[None, :]
    places = rows.to(tl.int64)[:, None]
    if SAVE:
        saved = hidden + places * up_size + cols[None, :]
        tl.store(saved, gate.to(hidden.dtype.element_ty), mask=kept)
        if GATED:
            tl.store(saved + INNER, up.to(hidden.dtype.element_ty), mask=kept)
    value, _ = ACTIVATION(gate)
    if GATED:
        value *= up
    tl.store(activated + places * INNER + cols[None, :], value.to(activated.dtype.element_ty), mask=kept)


def up_projection(x, up, bias, experts: Experts, routing: Routing, save: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The up-projection [S, U] (no rows unless `save`) and the activations [S, I]."""
    slots = routing.slot_of_row.numel()
    hidden = x.new_empty(slots if save else 0, experts.width)
    activated = x.new_empty(slots, experts.inner)
    grid, w, options = experts.product("up", up, not experts.transposed, experts.inner, routing)
    up_kernel[grid](
        x,
        w,
        bias,
        hidden,
        activated,
        routing.slot_of_row,
        routing.offsets,
        routing.tiles,
        D=x.shape[1],
        INNER=experts.inner,
        SAVE=save,
        HAS_BIAS=bias is not None,
        **experts.formula,
        **options,
    )
    return hidden, activated
