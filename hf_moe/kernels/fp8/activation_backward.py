"""Backward of the activation and of the weighting, quantised along both axes while it is in registers.

With d_s = dO_t W_down of a slot s, g = dH = w_s d_s act'(h) goes on to two products: along its columns to the gradient of
x, along its rows to that of W_up, which V3 quantises each from what was not quantised before. W_down's gradient
takes the weighted activations w_s A_s along their rows, computed again from h in FP8 (3.3.3). <d_s, A_s> is that of w_s.
"""

import torch
import triton
import triton.language as tl

from ..activations import activate
from ..layer import Experts
from ..routing_metadata import Routing
from .format import BLOCK, Tiles
from .quantise import in_tiles, store_turned


@triton.jit
def activation_backward_kernel(
    product,  # rows [R, I]: d_s
    hidden,  # places [S, U]
    hidden_scales,  # [blocks of U, S]
    weights,  # [T, K]
    along,  # rows [R, U]: g in tiles along U
    along_scales,  # [blocks of U, R]
    turned,  # [U, R]: g in tiles along R
    turned_scales,  # [blocks of R, U]
    activated,  # [I, R]: w_s A_s in tiles along R
    activated_scales,  # [blocks of R, I]
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
    NEED_X: tl.constexpr,
    NEED_UP: tl.constexpr,
    NEED_DOWN: tl.constexpr,
):
    tl.static_assert(not INTERLEAVED)
    tile, block = tl.program_id(0), tl.program_id(1)
    if tile >= tl.load(offsets + 2 * num_experts + 1):
        return
    place = tl.load(tiles + 2 * tile + 1)
    U = 2 * INNER if GATED else INNER
    within = tl.arange(0, 128)
    rows, cols = tile * 128 + within, block * 128 + within
    slots = tl.load(slot_of_row + rows)
    inside = slots >= 0
    kept = inside[:, None]
    weight = tl.load(weights + slots, mask=inside, other=0.0).to(tl.float32)[:, None]
    d = tl.load(product + rows.to(tl.int64)[:, None] * INNER + cols[None, :], mask=kept, other=0.0).to(tl.float32)
    at = hidden + (place + within).to(tl.int64)[:, None] * U + cols[None, :]
    at_scales = hidden_scales + block * places + place + within
    gate = tl.load(at, mask=kept, other=0.0).to(tl.float32) * tl.load(at_scales, mask=inside, other=0.0)[:, None]
    up = gate
    if GATED:
        factor = tl.load(at_scales + (INNER // 128) * places, mask=inside, other=0.0)[:, None]
        up = tl.load(at + INNER, mask=kept, other=0.0).to(tl.float32) * factor
    value, gate_slope, up_slope = activate(gate, up, ACTIVATION, GATED, LIMIT, SHIFT)
    tl.store(scores + block * rows_size + rows, tl.sum(d * value, 1))
    if NEED_DOWN:
        store_turned(weight * value, activated, activated_scales, tile, block, INNER, rows_size)
    d *= weight
    store_both(d * gate_slope, along, along_scales, turned, turned_scales, tile, block, U, rows_size, NEED_X, NEED_UP)
    if GATED:
        block += INNER // 128
        store_both(d * up_slope, along, along_scales, turned, turned_scales, tile, block, U, rows_size, NEED_X, NEED_UP)


@triton.jit
def store_both(
    value, along, along_scales, turned, turned_scales, tile, block, size, rows_size, ALONG: tl.constexpr, TURN: tl.constexpr
):
    """A tile [128 rows, 128 columns] in tiles along its columns if ALONG, and along its rows if TURN."""
    within = tl.arange(0, 128)
    rows, cols = tile * 128 + within, block * 128 + within
    if ALONG:
        codes, scale = in_tiles(value, 1)
        at = along + rows.to(tl.int64)[:, None] * size + cols[None, :]
        tl.store(at, codes.to(along.dtype.element_ty))
        tl.store(along_scales + block * rows_size + rows, scale)
    if TURN:
        store_turned(value, turned, turned_scales, tile, block, size, rows_size)


def activation_backward(
    product: torch.Tensor,
    hidden: Tiles,
    weights: torch.Tensor,
    experts: Experts,
    routing: Routing,
    need_x: bool,
    need_up: bool,
    need_down: bool,
) -> tuple[Tiles, Tiles, Tiles, torch.Tensor]:
    """g in rows (U), g turned [U, R], the weighted activations turned [I, R], and <d_s, A_s> of rows in blocks of I."""
    rows, inner, width = len(product), experts.inner, experts.halves * experts.inner
    blocks = rows // BLOCK

    def tiles(*shape: int, needed: bool) -> Tiles:
        """Uninitialised, in tiles along the last axis; of no size where nobody needs them."""
        size = (shape[-1] // BLOCK, shape[0]) if needed else (0, 0)
        return Tiles(hidden.codes.new_empty(shape if needed else (0, 0)), hidden.scales.new_empty(size))

    along = tiles(rows, width, needed=need_x)
    turned = tiles(width, rows, needed=need_up)
    activated = tiles(inner, rows, needed=need_down)
    scores = product.new_empty(inner // BLOCK, rows, dtype=torch.float32)
    activation_backward_kernel[(blocks, inner // BLOCK)](
        product,
        *hidden,
        weights,
        *along,
        *turned,
        *activated,
        scores,
        routing.slot_of_row,
        routing.offsets,
        routing.tiles,
        experts.num_experts,
        INNER=inner,
        places=hidden.scales.shape[1],
        rows_size=rows,
        **experts.formula_options,
        NEED_X=need_x,
        NEED_UP=need_up,
        NEED_DOWN=need_down,
        num_warps=16,
    )
    return along, turned, activated, scores
