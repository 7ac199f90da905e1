"""The first grouped product: x gathered by token inside the load, the activation in the epilogue."""

import torch
import triton
import triton.language as tl

from .activations import activate
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
def up_kernel(
    x,  # [T, D]
    w,  # [E, U, D] if W_LAST, else [E, D, U]; U = 2I (gate and up) if GATED, else I; [2E, I, D] if JOINED
    bias,  # [E, U]
    low,  # [T, E, RANK]
    factor,  # [E, U, RANK]
    hidden,  # places [S, U]: before the activation
    activated,  # rows [S, I]
    slot_of_row,
    offsets,
    tiles,
    num_experts,
    D,
    INNER,  # I
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,  # gate and up take turns; else all of gate comes first
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,  # 0: no low-rank part
    PADDED: tl.constexpr,
    JOINED: tl.constexpr,  # one product of both halves: wider, so faster
    SAVE: tl.constexpr,
    W_LAST: tl.constexpr,
    W_TMA: tl.constexpr,
    OUT_TMA: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    row_tiles, col_tiles = tl.load(offsets + 2 * num_experts + 1), tl.cdiv(INNER, COLS)
    U = 2 * INNER if GATED else INNER
    for program in tl.range(tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0), flatten=FLATTEN):
        row_tile, col_tile = locate(program, row_tiles, col_tiles, GROUP)
        expert, place = tl.load(tiles + 2 * row_tile), tl.load(tiles + 2 * row_tile + 1)
        row, col = row_tile * ROWS, col_tile * COLS
        slots = tl.load(slot_of_row + row + tl.arange(0, ROWS))
        tokens = (tl.maximum(slots, 0) // TOP_K).to(tl.int64)  # filling rows compute token 0, which nothing reads

        starts = (tokens * num_experts + expert) * RANK
        cols, turns = col + tl.arange(0, COLS), 2 * col + tl.arange(0, 2 * COLS)
        if JOINED:
            both = tl.zeros([ROWS, 2 * COLS], tl.float32)
            for depth in range(0, D, DEPTH):
                a = rows_tile(x, row, tokens, depth, D, False, EVEN, DEPTH)
                b = w.load([2 * expert, col, depth]).reshape(2 * COLS, DEPTH).T
                both = tl.dot(a, b, both, input_precision=PRECISION)
            gate, up = split_columns(both, 2)
        elif INTERLEAVED:
            both = tl.zeros([ROWS, 2 * COLS], tl.float32)
            for depth in range(0, D, DEPTH):
                a = rows_tile(x, row, tokens, depth, D, False, EVEN, DEPTH)
                b = weight_tile(w, expert, depth, 2 * col, D, U, W_LAST, W_TMA, DEPTH, 2 * COLS)
                both = tl.dot(a, b, both, input_precision=PRECISION)
            both = with_added(both, bias, low, factor, starts, expert, turns, U, HAS_BIAS, RANK, PADDED)
            gate, up = tl.split(both.reshape(ROWS, COLS, 2))
        else:
            gate = tl.zeros([ROWS, COLS], tl.float32)
            up = tl.zeros([ROWS, COLS], tl.float32)
            for depth in range(0, D, DEPTH):
                a = rows_tile(x, row, tokens, depth, D, False, EVEN, DEPTH)
                b = weight_tile(w, expert, depth, col, D, U, W_LAST, W_TMA, DEPTH, COLS)
                gate = tl.dot(a, b, gate, input_precision=PRECISION)
                if GATED:
                    b = weight_tile(w, expert, depth, INNER + col, D, U, W_LAST, W_TMA, DEPTH, COLS)
                    up = tl.dot(a, b, up, input_precision=PRECISION)

        if not INTERLEAVED:  # what lies beyond the last column of gate is not stored
            gate = with_added(gate, bias, low, factor, starts, expert, cols, U, HAS_BIAS, RANK, PADDED)
            if GATED:
                up = with_added(up, bias, low, factor, starts, expert, INNER + cols, U, HAS_BIAS, RANK, PADDED)
        if SAVE:
            within = tl.arange(0, ROWS)
            kept = (within < tl.load(offsets + expert + 1) - place)[:, None]
            saved = hidden + place.to(tl.int64) * U + within[:, None] * U
            if INTERLEAVED:
                pairs = tl.interleave(gate, up).to(hidden.dtype.element_ty)
                tl.store(saved + turns[None, :], pairs, mask=kept & (turns < U)[None, :])
            else:
                kept &= (cols < INNER)[None, :]
                tl.store(saved + cols[None, :], gate.to(hidden.dtype.element_ty), mask=kept)
                if GATED:
                    tl.store(saved + INNER + cols[None, :], up.to(hidden.dtype.element_ty), mask=kept)
        value, _, _ = activate(gate, up, ACTIVATION, GATED, LIMIT, SHIFT)
        store_tile(activated, value.to(hidden.dtype.element_ty), row, col, INNER, OUT_TMA)


def up_projection(
    x, up, bias, low, factor, experts: Experts, routing: Routing, save: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The up-projection [S, U] (no rows unless `save`) and the activations in rows (I)."""
    hidden = x.new_empty(routing.row_of_slot.numel() if save else 0, experts.halves * experts.inner)
    # As many rows as any tile could ask for, so that the compiler knows how many without knowing the tile.
    activated = x.new_empty(len(routing.slot_of_row), experts.inner)
    grid, w, options = experts.product("up", up, not experts.formula.transposed, experts.inner, routing)
    formula, columns, depth = experts.formula, options["COLS"], options["DEPTH"]
    joined = formula.gated and options["W_LAST"] and options["W_TMA"] and not formula.interleaved
    if joined:
        w = operand(up.view(-1, experts.inner, x.shape[1]), 2, columns, depth)
    elif formula.interleaved and options["W_TMA"]:
        w = operand(up, 1, *((depth, 2 * columns) if formula.transposed else (2 * columns, depth)))
    up_kernel[grid](
        x,
        w,
        bias,
        low,
        factor,
        hidden,
        operand(activated, options["ROWS"], options["COLS"]),
        routing.slot_of_row,
        routing.offsets,
        routing.tiles,
        D=x.shape[1],
        INNER=experts.inner,
        JOINED=joined,
        SAVE=save,
        HAS_BIAS=bias is not None,
        **low_rank(factor),
        OUT_TMA=described(activated, options["COLS"]),
        TOP_K=experts.top_k,
        **experts.formula_options,
        **options,
    )
    return hidden, activated
