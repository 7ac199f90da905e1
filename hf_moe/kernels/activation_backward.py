"""Backward of the activation and of the weighting, in one pass over memory.

With A = act(gate) up and out_t = sum_k w_s (A_s W_e^T + b_e), let d_s = dO_t W_e. Then the gradient of the weight is
<d_s, A_s> + <dO_t, b_e>, so that the down-projection's output need not be kept (SonicMoE,
https://arxiv.org/abs/2512.14080); that of A_s is w_s d_s, and W_down's needs w_s A_s.

As the epilogue of the product that gives d_s the same arithmetic took longer than product and pass together: its loads
and stores, five times the tile, leave the tensor cores idle.
"""

import torch
import triton
import triton.language as tl

from .activations import activate
from .launch import FUSED
from .layer import Experts
from .routing_metadata import Routing
from .tiles import pass_rows


@triton.jit
def activation_backward_kernel(
    product,  # rows [S, I]: d_s, overwritten by w_s A_s if NEED_WEIGHTED
    hidden,  # places [S, U]
    grad,  # rows [S, D]: dO_t
    weights,  # [T, K]
    bias,  # [E, D]
    grad_hidden,  # rows [S, U]
    grad_weights,  # [T, K], zeros before
    slot_of_row,
    offsets,
    tiles,
    num_experts,
    D,
    INNER,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    NEED_HIDDEN: tl.constexpr,
    NEED_WEIGHTED: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    first = tl.program_id(0) * ROWS
    tile = first // TILE
    if tile >= tl.load(offsets + 2 * num_experts + 1):
        return
    expert, place = tl.load(tiles + 2 * tile), tl.load(tiles + 2 * tile + 1) + first % TILE
    U = 2 * INNER if GATED else INNER
    rows = first + tl.arange(0, ROWS)
    slots = tl.load(slot_of_row + rows)
    inside = slots >= 0
    weight = tl.load(weights + slots, mask=inside, other=0.0).to(tl.float32)[:, None]
    at_product = product + rows.to(tl.int64)[:, None] * INNER
    at_hidden = hidden + (place + tl.arange(0, ROWS)).to(tl.int64)[:, None] * U
    at_grad = grad_hidden + rows.to(tl.int64)[:, None] * U

    score = tl.zeros([ROWS], tl.float32)
    for col in range(0, INNER, COLS):
        cols = (col + tl.arange(0, COLS))[None, :]
        wide = cols < INNER
        kept = inside[:, None] & wide
        d = tl.load(at_product + cols, mask=kept, other=0.0).to(tl.float32)
        both = (2 * col + tl.arange(0, 2 * COLS))[None, :]  # gate and up, where they take turns
        if INTERLEAVED:
            pairs = tl.load(at_hidden + both, mask=inside[:, None] & (both < U), other=0.0).to(tl.float32)
            gate, up = tl.split(pairs.reshape(ROWS, COLS, 2))
        else:
            gate = tl.load(at_hidden + cols, mask=kept, other=0.0).to(tl.float32)
            up = gate
            if GATED:
                up = tl.load(at_hidden + INNER + cols, mask=kept, other=0.0).to(tl.float32)
        value, gate_slope, up_slope = activate(gate, up, ACTIVATION, GATED, LIMIT, SHIFT)
        if NEED_HIDDEN:
            grad_gate = (weight * d * gate_slope).to(grad_hidden.dtype.element_ty)
            grad_up = (weight * d * up_slope).to(grad_hidden.dtype.element_ty)
            if INTERLEAVED:
                tl.store(at_grad + both, tl.interleave(grad_gate, grad_up), mask=both < U)
            else:
                tl.store(at_grad + cols, grad_gate, mask=wide)
                if GATED:
                    tl.store(at_grad + INNER + cols, grad_up, mask=wide)
        if NEED_WEIGHTED:
            tl.store(at_product + cols, (weight * value).to(product.dtype.element_ty), mask=wide)
        score += tl.sum(d * value, 1)

    if NEED_WEIGHTS:
        if HAS_BIAS:
            for col in range(0, D, COLS):
                cols = (col + tl.arange(0, COLS))[None, :]
                kept = inside[:, None] & (cols < D)
                left = tl.load(grad + rows.to(tl.int64)[:, None] * D + cols, mask=kept, other=0.0).to(tl.float32)
                right = tl.load(bias + expert.to(tl.int64) * D + cols, mask=cols < D, other=0.0).to(tl.float32)
                score += tl.sum(left * right, 1)
        tl.store(grad_weights + slots, score.to(grad_weights.dtype.element_ty), mask=inside)


def activation_backward(
    product: torch.Tensor,
    hidden: torch.Tensor,
    grad: torch.Tensor,
    weights: torch.Tensor,
    bias: torch.Tensor | None,
    experts: Experts,
    routing: Routing,
    need_hidden: bool,
    need_weighted: bool,
    need_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the up-projection's gradient (U) and the gradient of `weights` [T, K]; `product` becomes w_s A_s."""
    inner = experts.inner
    grad_hidden = experts.rows(routing, experts.halves * inner, hidden) if need_hidden else hidden.new_empty(0)
    grad_weights = torch.zeros_like(weights)
    rows, cols = pass_rows(product.device), min(512, triton.next_power_of_2(inner))
    activation_backward_kernel[(len(product) // rows,)](
        product,
        hidden,
        grad,
        weights,
        bias,
        grad_hidden,
        grad_weights,
        routing.slot_of_row,
        routing.offsets,
        routing.tiles,
        experts.num_experts,
        D=grad.shape[1],
        INNER=inner,
        **experts.formula_options,
        HAS_BIAS=bias is not None,
        NEED_HIDDEN=need_hidden,
        NEED_WEIGHTED=need_weighted,
        NEED_WEIGHTS=need_weights,
        TILE=experts.tile,
        ROWS=rows,
        COLS=cols,
        num_warps=2,
        **FUSED,
    )
    return grad_hidden, grad_weights
