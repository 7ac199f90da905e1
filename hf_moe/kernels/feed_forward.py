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
from .routing_metadata import Routing, empty_routing, route
from .token_rows import combine, gather
from .up_projection import up_projection
from .weight_gradient import weight_gradient


def on(device: torch.device):
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def forward(x, index, weights, up, down, up_bias, down_bias, formula: Formula, save):
    """Output [T, D], the up-projection [S, U] (no rows unless `save`) and the routing's four tensors."""
    experts = Experts.of(index, down, formula)
    if index.numel() == 0:
        return (
            torch.zeros_like(x),
            x.new_empty(0, experts.halves * experts.inner),
            *empty_routing(index, experts.num_experts),
        )
    with on(x.device):
        routing = route(index, weights, experts.num_experts, experts.tile, skip_zero=not save)
        hidden, activated = up_projection(x, up, up_bias, experts, routing, save)
        rows = product(activated, down, down_bias, not formula.transposed, experts, routing)
        return combine(rows, weights, experts, routing), hidden, *routing


def backward(
    grad, x, index, weights, up, down, up_bias, down_bias, hidden, routing, formula: Formula, needs
) -> list[torch.Tensor]:
    """Gradients of those of x, weights, up, down, up_bias and down_bias that `needs` marks, in this order."""
    if index.numel() == 0:
        inputs = zip((x, weights, up, down, up_bias, down_bias), needs, strict=True)
        return [torch.zeros_like(tensor) for tensor, need in inputs if need]
    experts, routing = Experts.of(index, down, formula), Routing(*routing)
    need_x, need_weights, need_up, need_down, need_up_bias, need_down_bias = needs
    need_hidden = need_x or need_up or need_up_bias
    grad_x = grad_up = grad_down = grad_up_bias = grad_down_bias = None
    with on(x.device):
        grad = gather(grad, experts, routing)
        activated = product(grad, down, None, formula.transposed, experts, routing)
        grad_hidden, grad_weights = activation_backward(
            activated, hidden, grad, weights, down_bias, experts, routing, need_hidden, need_down, need_weights
        )
        if need_down:
            grad_down = weight_gradient(*oriented(grad, activated, formula.transposed), experts, routing)
        if need_down_bias:
            grad_down_bias = bias_gradient(grad, experts, routing, weights)
        del activated, grad
        if need_up:
            grad_up = weight_gradient(
                *oriented(grad_hidden, gather(x, experts, routing), formula.transposed), experts, routing
            )
        if need_up_bias:
            grad_up_bias = bias_gradient(grad_hidden, experts, routing)
        if need_x:
            rows = product(grad_hidden, up, None, formula.transposed, experts, routing)
            grad_x = combine(rows, None, experts, routing)
    gradients = (grad_x, grad_weights, grad_up, grad_down, grad_up_bias, grad_down_bias)
    return [gradient for gradient, need in zip(gradients, needs, strict=True) if need]


def oriented(out: torch.Tensor, into: torch.Tensor, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Left and right of the gradient of a weight [E, out, in], or [E, in, out] if transposed."""
    return (into, out) if transposed else (out, into)
