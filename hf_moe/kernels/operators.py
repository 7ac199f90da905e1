"""The experts as two PyTorch operators, so that torch.compile, autocast and checkpointing see one opaque step.

Nothing here needs Triton or a GPU: the kernels are imported when an operator first runs.
"""

import torch

from .formula import Formula
from .routing_sizes import routing_sizes

NAMES = ("x", "weights", "up", "down", "up_bias", "down_bias")


@torch.library.custom_op("hf_moe::experts", mutates_args=())
def experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    activation: str,
    gated: bool,
    transposed: bool,
    interleaved: bool,
    limit: float | None,
    shift: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """sum_k weights[t, k] FFN_{index[t, k]}(x[t]) [T, D] of a `Formula`, then what the backward needs if `save`.

    x [T, D]; index (int64) and weights [T, K]; up [E, U, D] and down [E, D, I], or [E, D, U] and [E, I, D] if
    `transposed`, U = 2I if `gated`, else I; x and the experts of one dtype. An index outside
    [0, E) adds nothing. Without `save`, slots of weight 0 are not computed.
    """
    from . import feed_forward

    return feed_forward.forward(
        *(contiguous(tensor) for tensor in (x, index, weights, up, down, up_bias, down_bias)),
        Formula(activation, gated, transposed, interleaved, limit, shift),
        save,
    )


@experts.register_fake
def _(x, index, weights, up, down, up_bias, down_bias, activation, gated, transposed, interleaved, limit, shift, save):
    slots, num_experts = index.numel(), up.shape[0]
    width = up.shape[2 if transposed else 1]
    hidden = x.new_empty(slots if save else 0, width)
    sizes = routing_sizes(slots, num_experts)
    return x.new_empty(x.shape), hidden, *(index.new_empty(size, dtype=torch.int32) for size in sizes)


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


@torch.library.custom_op("hf_moe::experts_backward", mutates_args=())
def experts_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    hidden: torch.Tensor,
    routing: list[torch.Tensor],
    activation: str,
    gated: bool,
    transposed: bool,
    interleaved: bool,
    limit: float | None,
    shift: float,
    needs: list[bool],
) -> list[torch.Tensor]:
    """Gradients of those of x, weights, up, down, up_bias and down_bias that `needs` marks, in this order."""
    from . import feed_forward

    return feed_forward.backward(
        *(contiguous(tensor) for tensor in (grad, x, index, weights, up, down, up_bias, down_bias)),
        hidden,
        routing,
        Formula(activation, gated, transposed, interleaved, limit, shift),
        needs,
    )


@experts_backward.register_fake
def _(grad, x, index, weights, up, down, up_bias, down_bias, hidden, routing, *formula_and_needs):
    *_, needs = formula_and_needs
    inputs = (x, weights, up, down, up_bias, down_bias)
    return [tensor.new_empty(tensor.shape) for tensor, need in zip(inputs, needs, strict=True) if need]


def setup_context(ctx, inputs, output):
    x, index, weights, up, down, up_bias, down_bias, *ctx.formula, save = inputs
    _, hidden, *routing = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, index, weights, up, down, up_bias, down_bias, hidden, *routing)
    ctx.saved = save


def backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 14
    assert ctx.saved, "hf_moe::experts ran with save=False, which keeps nothing for a backward pass"
    x, index, weights, up, down, up_bias, down_bias, hidden, *routing = ctx.saved_tensors
    needed = ctx.needs_input_grad
    needs = [needed[place] for place in (0, 2, 3, 4, 5, 6)]
    gradients = iter(
        torch.ops.hf_moe.experts_backward(
            grad, x, index, weights, up, down, up_bias, down_bias, hidden, routing, *ctx.formula, needs
        )
    )
    x, weights, *others = (next(gradients) if need else None for need in needs)
    return x, None, weights, *others, *[None] * 7


experts.register_autograd(backward, setup_context=setup_context)
