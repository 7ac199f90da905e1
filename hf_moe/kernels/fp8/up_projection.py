"""The first grouped product in FP8: tokens gathered inside the load; activation and quantisation in the epilogue."""

import torch
import triton
import triton.language as tl

from ..activations import activate
from ..layer import Experts
from ..routing_metadata import Routing
from ..tile_loads import described, locate, low_rank, matrix_tile, operand, rows_tile, store_tile, with_added
from .format import BLOCK, Blocks, Tiles
from .launch import launch
from .quantise import in_tiles


@triton.jit
def up_kernel(
    x,  # [T, D]
    x_scales,  # [blocks of D, T]
    w,  # [E, U, D]; U = 2I (all of gate first) if GATED, else I
    w_scales,  # [E, blocks of U, blocks of D]
    low,  # [T, E, RANK]
    factor,  # [E, U, RANK]
    hidden,  # places [S, U]: before the activation
    hidden_scales,  # [blocks of U, S]
    activated,  # rows [R, I]
    activated_scales,  # [blocks of I, R]
    plain,  # rows [R, I]: the activations before they were quantised
    slot_of_row,
    offsets,
    tiles,
    num_experts,
    T,
    D,
    INNER,  # I
    places,  # S
    rows_size,  # R
    TOP_K: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    RANK: tl.constexpr,  # 0: no low-rank part
    PADDED: tl.constexpr,
    SAVE: tl.constexpr,
    PLAIN: tl.constexpr,
    W_TMA: tl.constexpr,
    OUT_TMA: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    tl.static_assert(not INTERLEAVED)
    row_tiles, col_tiles = tl.load(offsets + 2 * num_experts + 1), INNER // 128
    U = 2 * INNER if GATED else INNER
    depth_blocks = D // 128
    for program in tl.range(tl.program_id(0), row_tiles * col_tiles, tl.num_programs(0), flatten=FLATTEN):
        row_tile, col_tile = locate(program, row_tiles, col_tiles, GROUP)
        expert, place = tl.load(tiles + 2 * row_tile), tl.load(tiles + 2 * row_tile + 1)
        row, col = row_tile * 128, col_tile * 128
        within = tl.arange(0, 128)
        tokens = (
            tl.maximum(tl.load(slot_of_row + row + within), 0) // TOP_K
        )  # filling computes token 0: nobody reads it
        wide = tokens.to(tl.int64)
        gate_scales = w_scales + (expert * (U // 128) + col_tile) * depth_blocks
        up_scales = gate_scales + col_tiles * depth_blocks

        gate = tl.zeros([128, 128], tl.float32)
        up = tl.zeros([128, 128], tl.float32)
        for block in range(0, depth_blocks):
            depth = block * 128
            a = rows_tile(x, row, wide, depth, D, False, True, 128)
            scale = tl.load(x_scales + block * T + tokens)
            b = matrix_tile(w, expert, col, depth, U, D, W_TMA, 128, 128).T
            gate += tl.dot(a, b) * (scale * tl.load(gate_scales + block))[:, None]
            if GATED:
                b = matrix_tile(w, expert, INNER + col, depth, U, D, W_TMA, 128, 128).T
                up += tl.dot(a, b) * (scale * tl.load(up_scales + block))[:, None]

        if RANK > 0:
            starts, cols = (wide * num_experts + expert) * RANK, col + within
            gate = with_added(gate, None, low, factor, starts, expert, cols, U, False, RANK, PADDED)
            if GATED:
                up = with_added(up, None, low, factor, starts, expert, INNER + cols, U, False, RANK, PADDED)
        if SAVE:
            kept = within < tl.load(offsets + expert + 1) - place
            to = place + within
            save_tile(hidden, hidden_scales, gate, to, kept, col, U, places)
            if GATED:
                save_tile(hidden, hidden_scales, up, to, kept, INNER + col, U, places)
        value, _, _ = activate(gate, up, ACTIVATION, GATED, LIMIT, SHIFT)
        if PLAIN:
            store_tile(plain, value.to(plain.dtype.element_ty), row, col, INNER, False)
        value, scale = in_tiles(value, 1)
        store_tile(activated, value.to(hidden.dtype.element_ty), row, col, INNER, OUT_TMA)
        tl.store(activated_scales + col_tile * rows_size + row + within, scale)


@triton.jit
def save_tile(codes, scales, value, rows, kept, col, size, rows_size):
    """Quantise a tile [128, 128] at column `col` along it, to those of `rows` that are kept."""
    value, scale = in_tiles(value, 1)
    at = rows.to(tl.int64)[:, None] * size + (col + tl.arange(0, 128))[None, :]
    tl.store(codes + at, value.to(codes.dtype.element_ty), mask=kept[:, None])
    tl.store(scales + col // 128 * rows_size + rows, scale, mask=kept)


def up_projection(
    x: Tiles, up: Blocks, low, widen, dtype: torch.dtype, experts: Experts, routing: Routing, save: bool, plain: bool
) -> tuple[Tiles, Tiles, torch.Tensor]:
    """The up-projection in places [S, U] (none unless `save`) and the activations in rows (I), in tiles both; these in
    `dtype` as well, if `plain`. widen_e low[t, e] [T, E, r] is added to the up-projection."""
    rows, width = experts.row_tiles(routing) * experts.tile, experts.halves * experts.inner
    places = routing.row_of_slot.numel() if save else 0
    hidden = Tiles(x.codes.new_empty(places, width), x.scales.new_empty(width // BLOCK, places))
    activated = Tiles(x.codes.new_empty(rows, experts.inner), x.scales.new_empty(experts.inner // BLOCK, rows))
    exact = x.codes.new_empty(rows if plain else 0, experts.inner, dtype=dtype)
    kernel = "up_low_rank" if plain or widen is not None else "up"
    grid, options = launch(kernel, experts.row_tiles(routing), experts.inner, x.codes.device)
    up_kernel[grid](
        *x,
        operand(up.codes, 1, BLOCK, BLOCK),
        up.scales,
        low,
        widen,
        *hidden,
        operand(activated.codes, BLOCK, BLOCK),
        activated.scales,
        exact,
        routing.slot_of_row,
        routing.offsets,
        routing.tiles,
        experts.num_experts,
        *x.codes.shape,
        INNER=experts.inner,
        places=places,
        rows_size=rows,
        TOP_K=experts.top_k,
        **experts.formula_options,
        **low_rank(widen),
        SAVE=save,
        PLAIN=plain,
        W_TMA=described(up.codes, BLOCK),
        OUT_TMA=described(activated.codes, BLOCK),
        **options,
    )
    return hidden, activated, exact
