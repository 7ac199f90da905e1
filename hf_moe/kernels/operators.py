"""The experts as two PyTorch operators, so that torch.compile, autocast and checkpointing see one opaque step.

Nothing here needs Triton or a GPU: the kernels are imported when an operator first runs.
"""

import torch

from .formula import Formula
from .routing_sizes import routing_sizes

NAMES = ("x", "weights", "up", "down", "up_bias", "down_bias", "low", "widen", "narrow")


@torch.library.custom_op("hf_moe::experts", mutates_args=())
def experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    low: torch.Tensor | None,
    widen: torch.Tensor | None,
    narrow: torch.Tensor | None,
    activation: str,
    gated: bool,
    transposed: bool,
    interleaved: bool,
    limit: float | None,
    shift: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """sum_k weights[t, k] FFN_{index[t, k]}(x[t]) [T, D] of a `Formula`, the weighted activations narrowed, then what
    the backward needs if `save`.

    x [T, D]; index (int64) and weights [T, K]; up [E, U, D] and down [E, D, I], or [E, D, U] and [E, I, D] if
    `transposed`, U = 2I if `gated`, else I; x and the experts of one dtype. An index outside
    [0, E) adds nothing. Without `save`, slots of weight 0 are not computed.

    Of low ranks (low_rank.py): low [T, E, r] and widen [E, U, r] add widen_e low[t, e] to the up-projection; narrow
    [E, r, I] makes the second result, [T, K, r] (without it [T, K, 0]), of the activations times their weights.
    """
    from . import feed_forward

    return feed_forward.forward(
        *(contiguous(x) for x in (x, index, weights, up, down, up_bias, down_bias, low, widen, narrow)),
        Formula(activation, gated, transposed, interleaved, limit, shift),
        save,
    )


@experts.register_fake
def _(x, index, weights, up, down, up_bias, down_bias, low, widen, narrow, *formula_and_save):
    _, _, transposed, *_, save = formula_and_save
    slots, num_experts = index.numel(), up.shape[0]
    width = up.shape[2 if transposed else 1]
    narrowed = x.new_empty(*index.shape, 0 if narrow is None else narrow.shape[1])
    hidden = x.new_empty(slots if save else 0, width)
    sizes = routing_sizes(slots, num_experts)
    return x.new_empty(x.shape), narrowed, hidden, *(index.new_empty(size, dtype=torch.int32) for size in sizes)


def contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


@torch.library.custom_op("hf_moe::experts_backward", mutates_args=())
def experts_backward(
    grad: torch.Tensor,
    grad_narrowed: torch.Tensor | None,
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    low: torch.Tensor | None,
    widen: torch.Tensor | None,
    narrow: torch.Tensor | None,
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
    """Gradients of those of NAMES that `needs` marks, in this order."""
    from . import feed_forward

    operands = (grad, grad_narrowed, x, index, weights, up, down, up_bias, down_bias, low, widen, narrow)
    return feed_forward.backward(
        *(contiguous(tensor) for tensor in operands),
        hidden,
        routing,
        Formula(activation, gated, transposed, interleaved, limit, shift),
        needs,
    )


@experts_backward.register_fake
def _(grad, grad_narrowed, x, index, *operands_and_needs):
    *_, needs = operands_and_needs
    inputs = (x, *operands_and_needs[: len(NAMES) - 1])
    return [tensor.new_empty(tensor.shape) for tensor, need in zip(inputs, needs, strict=True) if need]


def setup_context(ctx, inputs, output):
    x, index, *others = inputs
    operands, (*ctx.formula, save) = others[: len(NAMES) - 1], others[len(NAMES) - 1 :]
    _, _, hidden, *routing = output
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, index, *operands, hidden, *routing)
    ctx.saved = save


def backward(ctx, grad, grad_narrowed, *_):
    if grad is None and grad_narrowed is None:
        return (None,) * (len(NAMES) + 8)
    assert ctx.saved, "hf_moe::experts ran with save=False, which keeps nothing for a backward pass"
    x, index, *others = ctx.saved_tensors
    operands, (hidden, *routing) = others[: len(NAMES) - 1], others[len(NAMES) - 1 :]
    needed = ctx.needs_input_grad
    needs = [needed[0], *needed[2 : len(NAMES) + 1]]
    grad = torch.zeros_like(x) if grad is None else grad
    gradients = iter(
        torch.ops.hf_moe.experts_backward(
            grad, grad_narrowed, x, index, *operands, hidden, routing, *ctx.formula, needs
        )
    )
    x, *others = (next(gradients) if need else None for need in needs)
    return x, None, *others, *[None] * 7


experts.register_autograd(backward, setup_context=setup_context)
