"""The experts of a layer, forward and backward: which kernels, in which order, and what is kept in between.

Kept for the backward: x, the up-projection and the routing. Rows that are written between two kernels (activations,
products before their sum) live only until the next one has read them.
"""

from contextlib import nullcontext

import torch

from .combine import bias_gradient, combine, score_gradient
from .down_backward import down_backward
from .grouped_product import product
from .layer import Experts
from .routing_metadata import Routing, empty_routing, route
from .up_projection import up_projection
from .weight_gradient import weight_gradient


def on(device: torch.device):
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def forward(x, index, weights, up, down, up_bias, down_bias, activation, gated, transposed, save):
    """Output [T, D], the up-projection [S, U] (no rows unless `save`) and the routing's four tensors."""
    experts = Experts.of(index, down, activation, gated, transposed)
    if index.numel() == 0:
        return (
            torch.zeros_like(x),
            x.new_empty(0, experts.halves * experts.inner),
            *empty_routing(index, experts.num_experts),
        )
    with on(x.device):
        routing = route(index, weights, experts.num_experts, experts.tile, skip_zero=not save)
        hidden, activated = up_projection(x, up, up_bias, experts, routing, save)
        rows = product("down", activated, down, down_bias, not transposed, experts, routing)
        return combine(rows, weights, routing, experts.top_k), hidden, *routing


def backward(
    grad, x, index, weights, up, down, up_bias, down_bias, hidden, routing, activation, gated, transposed, needs
) -> list[torch.Tensor]:
    """Gradients of those of x, weights, up, down, up_bias and down_bias that `needs` marks, in this order."""
    if index.numel() == 0:
        inputs = zip((x, weights, up, down, up_bias, down_bias), needs, strict=True)
        return [torch.zeros_like(tensor) for tensor, need in inputs if need]
    experts, routing = Experts.of(index, down, activation, gated, transposed), Routing(*routing)
    need_x, need_weights, need_up, need_down, need_up_bias, need_down_bias = needs
    need_hidden = need_x or need_up or need_up_bias
    gradients = []
    with on(x.device):
        if need_hidden or need_weights or need_down:
            grad_hidden, weighted, scores = down_backward(
                grad, down, weights, hidden, experts, routing, need_hidden, need_down
            )
        if need_x:
            rows = product("input_gradient", grad_hidden, up, None, transposed, experts, routing)
            gradients.append(combine(rows, None, routing, experts.top_k))
            del rows
        if need_weights:
            gradients.append(score_gradient(scores, grad, down_bias, index, weights, experts, routing))
        if need_up:
            sides = {"left": x, "right": grad_hidden} if transposed else {"left": grad_hidden, "right": x}
            gradients.append(weight_gradient(**sides, by_token=x, experts=experts, routing=routing))
        if need_down:
            sides = {"left": weighted, "right": grad} if transposed else {"left": grad, "right": weighted}
            gradients.append(weight_gradient(**sides, by_token=grad, experts=experts, routing=routing))
        if need_up_bias:
            gradients.append(bias_gradient(grad_hidden, experts, routing))
        if need_down_bias:
            gradients.append(bias_gradient(grad, experts, routing, weights))
    return gradients
