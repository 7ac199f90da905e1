"""Backward of the activation and of the weighting, in one pass over memory that reads the up-projection in FP8.

With d_s = dO_t W_down of a slot s, g = w_s d_s act'(h) is the gradient of the up-projection h, in FP8 for that of x,
as it is for that of the weight; W_down's takes the weighted activations w_s A_s, computed again from h in FP8 (V3,
3.3.3); <d_s, A_s> is that of w_s.
"""

import torch
import triton
import triton.language as tl

from ..activations import activate
from ..layer import Experts
from ..routing_metadata import Routing
from .format import BLOCK, Tiles
from .launch import FUSED, PASS_ROWS
from .quantise import in_tiles


@triton.jit
def activation_backward_kernel(
    product,  # rows [R, I]: d_s, overwritten by w_s A_s if NEED_WEIGHTED
    hidden,  # places [S, U]
    hidden_scales,  # [blocks of U, S]
    weights,  # [T, K]
    codes,  # rows [R, U]: g in tiles
    scales,  # [blocks of U, R]
    gradient,  # rows [R, U]: g
    scores,  # [blocks of I, R]: <d_s, A_s> of a block
    slot_of_row,
    offsets,
    tiles,
    num_experts,
    INNER,
    places,  # S
    rows_size,  # R
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    NEED_TILES: tl.constexpr,
    NEED_GRADIENT: tl.constexpr,
    NEED_WEIGHTED: tl.constexpr,
    ROWS: tl.constexpr,
):
    tl.static_assert(not INTERLEAVED)
    first, block = tl.program_id(0) * ROWS, tl.program_id(1)
    tile = first // 128
    if tile >= tl.load(offsets + 2 * num_experts + 1):
        return
    place = tl.load(tiles + 2 * tile + 1) + first % 128 + tl.arange(0, ROWS)
    U, blocks = 2 * INNER if GATED else INNER, INNER // 128
    rows, cols = first + tl.arange(0, ROWS), block * 128 + tl.arange(0, 128)
    slots = tl.load(slot_of_row + rows)
    inside = slots >= 0
    kept = inside[:, None]
    weight = tl.load(weights + slots, mask=inside, other=0.0).to(tl.float32)[:, None]
    at_product = product + rows.to(tl.int64)[:, None] * INNER + cols[None, :]
    d = tl.load(at_product, mask=kept, other=0.0).to(tl.float32)
    at = hidden + place.to(tl.int64)[:, None] * U + cols[None, :]
    at_scales = hidden_scales + block * places + place
    gate = tl.load(at, mask=kept, other=0.0).to(tl.float32) * tl.load(at_scales, mask=inside, other=0.0)[:, None]
    up = gate
    if GATED:
        scale = tl.load(at_scales + blocks * places, mask=inside, other=0.0)[:, None]
        up = tl.load(at + INNER, mask=kept, other=0.0).to(tl.float32) * scale
    value, gate_slope, up_slope = activate(gate, up, ACTIVATION, GATED, LIMIT, SHIFT)
    tl.store(scores + block * rows_size + rows, tl.sum(d * value, 1))
    if NEED_WEIGHTED:
        tl.store(at_product, (weight * value).to(product.dtype.element_ty))
    d *= weight
    needs: tl.constexpr = (NEED_TILES, NEED_GRADIENT)
    store(d * gate_slope, codes, scales, gradient, rows, block, U, rows_size, needs)
    if GATED:
        store(d * up_slope, codes, scales, gradient, rows, blocks + block, U, rows_size, needs)


@triton.jit
def store(value, codes, scales, plain, rows, block, size, rows_size, NEEDS: tl.constexpr):
    """[ROWS, 128] as the block `block` of their columns, quantised along these, and as they are."""
    at = rows.to(tl.int64)[:, None] * size + (block * 128 + tl.arange(0, 128))[None, :]
    if NEEDS[1]:
        tl.store(plain + at, value.to(plain.dtype.element_ty))
    if NEEDS[0]:
        value, scale = in_tiles(value, 1)
        tl.store(codes + at, value.to(codes.dtype.element_ty))
        tl.store(scales + block * rows_size + rows, scale)


def activation_backward(
    product: torch.Tensor,
    hidden: Tiles,
    weights: torch.Tensor,
    experts: Experts,
    routing: Routing,
    need_tiles: bool,
    need_gradient: bool,
    need_weighted: bool,
) -> tuple[Tiles, torch.Tensor, torch.Tensor]:
    """Rows of g (U), in tiles and as they are, and <d_s, A_s> of rows and blocks of I; `product` becomes w_s A_s."""
    rows, inner = product.shape
    width = experts.halves * inner
    shape = (rows, width) if need_tiles else (0, 0)
    tiles = Tiles(hidden.codes.new_empty(shape), hidden.scales.new_empty(shape[1] // BLOCK, shape[0]))
    gradient = product.new_empty(rows if need_gradient else 0, width)
    scores = product.new_empty(inner // BLOCK, rows, dtype=torch.float32)
    activation_backward_kernel[(rows // PASS_ROWS, inner // BLOCK)](
        product,
        *hidden,
        weights,
        *tiles,
        gradient,
        scores,
        routing.slot_of_row,
        routing.offsets,
        routing.tiles,
        experts.num_experts,
        INNER=inner,
        places=hidden.scales.shape[1],
        rows_size=rows,
        **experts.formula_options,
        NEED_TILES=need_tiles,
        NEED_GRADIENT=need_gradient,
        NEED_WEIGHTED=need_weighted,
        ROWS=PASS_ROWS,
        num_warps=4,
        **FUSED,
    )
    return tiles, gradient, scores
