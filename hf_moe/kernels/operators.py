"""The experts as a few PyTorch operators, so that torch.compile, autocast and checkpointing see opaque steps.

Nothing here needs Triton or a GPU: the kernels are imported when an operator first runs.
"""

from collections.abc import Callable

import torch

from .formula import Formula
from .routing_sizes import routing_sizes

NAMES = ("x", "weights", "up", "down", "up_bias", "down_bias", "low", "widen", "narrow")


@torch.library.custom_op("hf_moe::experts_up", mutates_args=())
def experts_up(
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
) -> tuple[
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    """Two places for gradients, the activations in rows [R, I], the up-projection [S, U], the routing's four tensors.

    Its backward is that of the whole layer: what comes back to `experts_down` and `experts_narrow` they hand on to the
    places, [T, D] and [T, K, r], which hold nothing. So these two keep nothing, and activation checkpointing, which
    stops once it has again what was kept, does not compute them a second time.
    """
    from . import feed_forward

    activated, hidden, routing = feed_forward.up(
        *(contiguous(tensor) for tensor in (x, index, weights, up, up_bias, low, widen)),
        down,
        Formula(activation, gated, transposed, interleaved, limit, shift),
        save,
    )
    return *places(x, index, narrow), activated, hidden, *routing


@experts_up.register_fake
def _(x, index, weights, up, down, up_bias, down_bias, low, widen, narrow, *formula_and_save):
    _, gated, transposed, *_, save = formula_and_save
    slots, num_experts = index.numel(), up.shape[0]
    width = up.shape[2 if transposed else 1]
    sizes = routing_sizes(slots, num_experts)
    activated = x.new_empty(*sizes[0], width // 2 if gated else width)
    hidden = x.new_empty(slots if save else 0, width)
    return *places(x, index, narrow), activated, hidden, *(index.new_empty(size, dtype=torch.int32) for size in sizes)


def places(x: torch.Tensor, index: torch.Tensor, narrow: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Shaped as what `experts_down` and `experts_narrow` return, of one number each."""
    rank = 0 if narrow is None else narrow.shape[1]
    return x.new_zeros(()).expand(x.shape), x.new_zeros(()).expand(*index.shape, rank)


@torch.library.custom_op("hf_moe::experts_narrow", mutates_args=())
def experts_narrow(
    place: torch.Tensor,
    activated: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    down: torch.Tensor,
    narrow: torch.Tensor,
    routing: list[torch.Tensor],
    transposed: bool,
) -> torch.Tensor:
    """The activations narrowed, times their weights: [T, K, r]."""
    from . import feed_forward

    operands = (contiguous(tensor) for tensor in (index, weights, narrow))
    return feed_forward.narrowed(activated, *operands, down, routing, transposed).to(place.dtype)


@torch.library.custom_op("hf_moe::experts_down", mutates_args=())
def experts_down(
    place: torch.Tensor,
    activated: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    down: torch.Tensor,
    down_bias: torch.Tensor | None,
    routing: list[torch.Tensor],
    transposed: bool,
) -> torch.Tensor:
    """sum_k weights[t, k] down_{index[t, k]} activated[t, k]: [T, D]."""
    from . import feed_forward

    operands = (contiguous(tensor) for tensor in (index, weights, down, down_bias))
    return feed_forward.down(place, activated, *operands, routing, transposed)


@experts_narrow.register_fake
@experts_down.register_fake
def _(place, *others):
    return place.new_empty(place.shape)


def nothing_kept(ctx, inputs, output):
    ctx.others = [[None] * len(x) if isinstance(x, list) else None for x in inputs[1:]]


def hand_on(ctx, grad):
    return grad, *ctx.others


experts_narrow.register_autograd(hand_on, setup_context=nothing_kept)
experts_down.register_autograd(hand_on, setup_context=nothing_kept)


def experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    *low_rank_formula_and_save,
    beside: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """sum_k weights[t, k] FFN_{index[t, k]}(x[t]) [T, D] of a `Formula`, and what `beside` makes of the weighted
    activations narrowed. The arguments are those of `experts_up`.

    x [T, D]; index (int64) and weights [T, K]; up [E, U, D] and down [E, D, I], or [E, D, U] and [E, I, D] if
    `transposed`, U = 2I if `gated`, else I; x and the experts of one dtype. An index outside
    [0, E) adds nothing. Only what was computed with `save` has a backward; without it slots of weight 0 are left out.

    Of low ranks (low_rank.py): low [T, E, r] and widen [E, U, r] add widen_e low[t, e] to the up-projection; narrow
    [E, r, I] makes [T, K, r] of the activations times their weights, for `beside`.
    """
    _, _, narrow, _, _, transposed, *_ = low_rank_formula_and_save
    place, place_narrow, activated, _, *routing = experts_up(
        x, index, weights, up, down, up_bias, down_bias, *low_rank_formula_and_save
    )
    added = None
    if narrow is not None:  # before the large product, so that what it keeps is kept by then
        added = beside(experts_narrow(place_narrow, activated, index, weights, down, narrow, routing, transposed))
    output = experts_down(place, activated, index, weights, down, down_bias, routing, transposed)
    return output if added is None else output + added


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
    _, _, _, hidden, *routing = output
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, index, *operands, hidden, *routing)
    ctx.saved = save


def backward(ctx, grad, grad_narrowed, *_):
    if grad is None and grad_narrowed is None:
        return (None,) * (len(NAMES) + 8)
    assert ctx.saved, "hf_moe::experts_up ran with save=False, which keeps nothing for a backward pass"
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


experts_up.register_autograd(backward, setup_context=setup_context)
