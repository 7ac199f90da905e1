"""Backward of the activation and of the weighting, in one pass over memory that reads and writes FP8.

With d_s = dO_t W_down of a slot s, g = w_s d_s act'(h) is the gradient of the up-projection h; W_down's takes the
weighted activations w_s A_s, computed again from h in FP8 (V3, 3.3.3); <d_s, A_s> is that of w_s.
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
    product,  # rows [R, I]: d_s
    hidden,  # places [S, U]
    hidden_scales,  # [blocks of U, S]
    weights,  # [T, K]
    gradient,  # rows [R, U]: g
    gradient_scales,  # [blocks of U, R]
    activated,  # rows [R, I]: w_s A_s
    activated_scales,  # [blocks of I, R]
    scores,  # [blocks of I, R]: <d_s, A_s> of a block
    plain_gradient,  # rows [R, U]: g before it was quantised
    plain_activated,  # rows [R, I]: w_s A_s likewise
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
    NEED_HIDDEN: tl.constexpr,
    NEED_WEIGHTED: tl.constexpr,
    PLAIN_HIDDEN: tl.constexpr,
    PLAIN_WEIGHTED: tl.constexpr,
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
    d = tl.load(product + rows.to(tl.int64)[:, None] * INNER + cols[None, :], mask=kept, other=0.0).to(tl.float32)
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
        store_tiles(weight * value, activated, activated_scales, rows, block, INNER, rows_size)
    if PLAIN_WEIGHTED:
        store_plain(weight * value, plain_activated, rows, block, INNER)
    d *= weight
    if NEED_HIDDEN:
        store_tiles(d * gate_slope, gradient, gradient_scales, rows, block, U, rows_size)
        if GATED:
            store_tiles(d * up_slope, gradient, gradient_scales, rows, blocks + block, U, rows_size)
    if PLAIN_HIDDEN:
        store_plain(d * gate_slope, plain_gradient, rows, block, U)
        if GATED:
            store_plain(d * up_slope, plain_gradient, rows, blocks + block, U)


@triton.jit
def store_plain(value, out, rows, block, size):
    at = rows.to(tl.int64)[:, None] * size + (block * 128 + tl.arange(0, 128))[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty))


@triton.jit
def store_tiles(value, codes, scales, rows, block, size, rows_size):
    """Quantise [ROWS, 128] along its columns, to the block `block` of them."""
    value, scale = in_tiles(value, 1)
    at = rows.to(tl.int64)[:, None] * size + (block * 128 + tl.arange(0, 128))[None, :]
    tl.store(codes + at, value.to(codes.dtype.element_ty))
    tl.store(scales + block * rows_size + rows, scale)


def activation_backward(
    product: torch.Tensor,
    hidden: Tiles,
    weights: torch.Tensor,
    experts: Experts,
    routing: Routing,
    need_hidden: bool,
    need_weighted: bool,
    plain_hidden: bool,
    plain_weighted: bool,
) -> tuple[Tiles, Tiles, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of g (U), rows of the weighted activations (I), <d_s, A_s> of rows, of each block of I; and the first two
    before they were quantised."""
    rows, inner = product.shape
    width = experts.halves * inner

    def tiles(columns: int, needed: bool) -> Tiles:
        shape = (rows, columns) if needed else (0, 0)
        return Tiles(hidden.codes.new_empty(shape), hidden.scales.new_empty(shape[1] // BLOCK, shape[0]))

    gradient, activated = tiles(width, need_hidden), tiles(inner, need_weighted)
    plain = [
        product.new_empty(rows if needed else 0, columns)
        for columns, needed in ((width, plain_hidden), (inner, plain_weighted))
    ]
    scores = product.new_empty(inner // BLOCK, rows, dtype=torch.float32)
    activation_backward_kernel[(rows // PASS_ROWS, inner // BLOCK)](
        product,
        *hidden,
        weights,
        *gradient,
        *activated,
        scores,
        *plain,
        routing.slot_of_row,
        routing.offsets,
        routing.tiles,
        experts.num_experts,
        INNER=inner,
        places=hidden.scales.shape[1],
        rows_size=rows,
        **experts.formula_options,
        NEED_HIDDEN=need_hidden,
        NEED_WEIGHTED=need_weighted,
        PLAIN_HIDDEN=plain_hidden,
        PLAIN_WEIGHTED=plain_weighted,
        ROWS=PASS_ROWS,
        num_warps=4,
        **FUSED,
    )
    return gradient, activated, scores, *plain
