"""The experts of a layer, forward and backward: which kernels, in which order, and what is kept in between.

Kept for the backward: x, the up-projection and the routing. Rows that are written between two kernels (activations,
products before their sum) live only until the next one has read them.
"""

from contextlib import nullcontext

import torch

from .activation_backward import activation_backward
from .bias_gradient import bias_gradient
from .formula import Formula
from .grouped_product import product
from .layer import Experts
from .low_rank import places
from .routing_metadata import Routing, empty_routing, route
from .token_rows import combine, gather
from .up_projection import up_projection
from .weight_gradient import weight_gradient


def on(device: torch.device):
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def plain(index: torch.Tensor, down: torch.Tensor, transposed: bool) -> Experts:
    """What launches share that compute no activation."""
    return Experts.of(index, down, Formula("linear", transposed=transposed))


def up(x, index, weights, up, up_bias, low, widen, down, formula: Formula, save):
    """The activations in rows [R, I], the up-projection [S, U] (no rows unless `save`), and the routing's four."""
    experts = Experts.of(index, down, formula)
    if index.numel() == 0:
        routing = empty_routing(index, experts.num_experts)
        activated = x.new_empty(len(routing[0]), experts.inner)
        return activated, x.new_empty(0, experts.halves * experts.inner), routing
    with on(x.device):
        routing = route(index, weights, experts.num_experts, experts.tile, skip_zero=not save)
        hidden, activated = up_projection(x, up, up_bias, low, widen, experts, routing, save)
    return activated, hidden, routing


def narrowed(activated, index, weights, narrow, down, routing, transposed: bool):
    """[T, K, r]: the activations by `narrow`, times their weights."""
    if index.numel() == 0:
        return activated.new_zeros(*index.shape, narrow.shape[1])
    routing, experts = Routing(*routing), plain(index, down, transposed)
    with on(activated.device):
        slots = slots_of(product(activated, narrow, None, True, experts, routing, kernel="narrow"), routing)
    return slots.view(*index.shape, -1) * weights.unsqueeze(-1)


def down(like, activated, index, weights, down, down_bias, routing, transposed: bool):
    """The sum [T, D] over a token's experts of the activations by `down`, times their weights."""
    if index.numel() == 0:
        return like.new_zeros(like.shape)
    routing, experts = Routing(*routing), plain(index, down, transposed)
    with on(activated.device):
        rows = product(activated, down, down_bias, not transposed, experts, routing)
        return combine(rows, weights, experts, routing)


def backward(
    grad,
    grad_narrowed,
    x,
    index,
    weights,
    up,
    down,
    up_bias,
    down_bias,
    low,
    widen,
    narrow,
    hidden,
    routing,
    formula: Formula,
    needs,
) -> list[torch.Tensor]:
    """Gradients of those of operators.NAMES that `needs` marks, in this order."""
    if index.numel() == 0:
        inputs = zip((x, weights, up, down, up_bias, down_bias, low, widen, narrow), needs, strict=True)
        return [torch.zeros_like(tensor) for tensor, need in inputs if need]
    experts, routing = Experts.of(index, down, formula), Routing(*routing)
    need_x, need_weights, need_up, need_down, need_up_bias, need_down_bias, need_low, need_widen, need_narrow = needs
    need_hidden = need_x or need_up or need_up_bias or need_low or need_widen
    grad_x = grad_up = grad_down = grad_up_bias = grad_down_bias = grad_low = grad_widen = grad_narrow = None
    with on(x.device):
        grad = gather(grad, experts, routing)
        # The narrowed activations are weighted, as the output is: their gradient joins that of the activations here.
        of_narrowed = back = None
        if grad_narrowed is not None and narrow is not None:
            of_narrowed, back = rows_of(grad_narrowed.flatten(0, 1), grad, routing), narrow.mT.contiguous()
        activated = product(grad, down, None, formula.transposed, experts, routing, of_narrowed, back)
        grad_hidden, grad_weights = activation_backward(
            activated,
            hidden,
            grad,
            weights,
            down_bias,
            experts,
            routing,
            need_hidden,
            need_down or need_narrow,
            need_weights,
        )
        if need_down:
            grad_down = weight_gradient(*oriented(grad, activated, formula.transposed), experts, routing)
        if need_narrow:
            grad_narrow = (
                torch.zeros_like(narrow)
                if of_narrowed is None
                else weight_gradient(of_narrowed, activated, experts, routing)
            )
        if need_down_bias:
            grad_down_bias = bias_gradient(grad, experts, routing, weights)
        del activated, grad
        if need_up:
            grad_up = weight_gradient(
                *oriented(grad_hidden, gather(x, experts, routing), formula.transposed), experts, routing
            )
        if need_up_bias:
            grad_up_bias = bias_gradient(grad_hidden, experts, routing)
        if need_widen:
            chosen = low.gather(1, places(index, low)).flatten(0, 1)
            grad_widen = weight_gradient(grad_hidden, rows_of(chosen, grad_hidden, routing), experts, routing)
        if need_low:
            slots = slots_of(product(grad_hidden, widen, None, False, experts, routing, kernel="narrow"), routing)
            grad_low = torch.zeros_like(low)
            grad_low.scatter_add_(1, places(index, low), slots.view(*index.shape, -1))
        if need_x:
            rows = product(grad_hidden, up, None, formula.transposed, experts, routing)
            grad_x = combine(rows, None, experts, routing)
    gradients = (grad_x, grad_weights, grad_up, grad_down, grad_up_bias, grad_down_bias)
    gradients += (grad_low, grad_widen, grad_narrow)
    return [gradient for gradient, need in zip(gradients, needs, strict=True) if need]


def slots_of(rows: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Rows in the order of slots [T K, r]; 0 of a slot that has none."""
    row = routing.row_of_slot.long()
    return rows[row.clamp(min=0)].masked_fill((row < 0).unsqueeze(-1), 0)


def rows_of(slots: torch.Tensor, like: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Slots [T K, r] in the order of rows, of which `like` has all; filling is 0."""
    rows = slots.new_zeros(len(like) + 1, slots.shape[1])
    row = routing.row_of_slot.long()
    return rows.index_copy_(0, torch.where(row < 0, len(like), row), slots)[:-1]


def oriented(out: torch.Tensor, into: torch.Tensor, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Left and right of the gradient of a weight [E, out, in], or [E, in, out] if transposed."""
    return (into, out) if transposed else (out, into)
