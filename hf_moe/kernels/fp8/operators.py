"""FP8 experts and linear layers as PyTorch operators: opaque steps to torch.compile, autocast and checkpointing.

Nothing here needs Triton or a GPU: the kernels are imported when an operator first runs.
"""

import torch

from ..formula import Formula
from ..operators import contiguous, hand_on, nothing_kept, places
from ..routing_sizes import routing_sizes
from .format import BLOCK, CODE, Tiles, up_to_blocks


def computes(x: torch.Tensor) -> bool:
    """Whether it is for the kernels; elsewhere their definition computes."""
    return x.is_cuda


@torch.library.custom_op("hf_moe::fp8_linear", mutates_args=())
def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, K] by a weight [N, K] in FP8."""
    from . import feed_forward

    return feed_forward.linear(x.contiguous(), contiguous(weight))


def empty_tiles(like: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = up_to_blocks(columns) // BLOCK
    return like.new_empty(rows, columns, dtype=CODE), like.new_empty(blocks, rows, dtype=torch.float32)


@linear.register_fake
def _(x, weight):
    return x.new_empty(len(x), len(weight))


@torch.library.custom_op("hf_moe::fp8_linear_backward", mutates_args=())
def linear_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, needs: list[bool]
) -> list[torch.Tensor]:
    """Gradients of those of x and weight that `needs` marks."""
    from . import feed_forward

    return feed_forward.linear_backward(grad.contiguous(), x.contiguous(), contiguous(weight), needs)


@linear_backward.register_fake
def _(grad, x, weight, needs):
    both = (grad.new_empty(len(grad), weight.shape[1]), torch.empty_like(weight))
    return [tensor for tensor, need in zip(both, needs, strict=True) if need]


def keep_linear(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def backward_of_linear(ctx, grad):
    needs = list(ctx.needs_input_grad)
    gradients = iter(torch.ops.hf_moe.fp8_linear_backward(grad, *ctx.saved_tensors, needs))
    return tuple(next(gradients) if need else None for need in needs)


linear.register_autograd(backward_of_linear, setup_context=keep_linear)


NAMES = ("x", "weights", "up", "down", "low", "widen", "narrow")


@torch.library.custom_op("hf_moe::fp8_experts_up", mutates_args=())
def experts_up(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    low: torch.Tensor | None,
    widen: torch.Tensor | None,
    narrow: torch.Tensor | None,
    activation: str,
    gated: bool,
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
    torch.Tensor,
    torch.Tensor,
    torch.Tensor,
]:
    """Two places for gradients, codes and scales of activations and up-projection, the activations before they were
    quantised (no rows without `narrow`), the routing's four tensors.

    As in `hf_moe::experts_up` its backward is that of the whole layer, and the other two operators keep nothing.
    """
    from . import feed_forward

    operands = (contiguous(tensor) for tensor in (x, index, weights, up, down, low, widen))
    formula = Formula(activation, gated, limit=limit, shift=shift)
    activated, hidden, plain, routing = feed_forward.up(*operands, formula, save, narrow is not None)
    return *places(x, index, narrow), *activated, *hidden, plain, *routing


@experts_up.register_fake
def _(x, index, weights, up, down, low, widen, narrow, activation, gated, limit, shift, save):
    slots, (num_experts, width, _) = index.numel(), up.shape
    inner, kept = down.shape[2], slots if save else 0
    rows = (slots // BLOCK + num_experts) * BLOCK
    tiles = (tensor for size in ((rows, inner), (kept, width)) for tensor in empty_tiles(x, *size))
    plain = x.new_empty(0 if narrow is None else rows, inner)
    routing = (index.new_empty(size, dtype=torch.int32) for size in routing_sizes(slots, num_experts))
    return *places(x, index, narrow), *tiles, plain, *routing


@torch.library.custom_op("hf_moe::fp8_experts_narrow", mutates_args=())
def experts_narrow(
    place: torch.Tensor,
    plain: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    down: torch.Tensor,
    narrow: torch.Tensor,
    routing: list[torch.Tensor],
) -> torch.Tensor:
    """The activations narrowed, times their weights: [T, K, r]."""
    from ..routing_metadata import Routing
    from . import feed_forward

    index, weights, narrow = (contiguous(tensor) for tensor in (index, weights, narrow))
    return feed_forward.narrowed(plain, index, weights, narrow, down, Routing(*routing)).to(place.dtype)


@torch.library.custom_op("hf_moe::fp8_experts_down", mutates_args=())
def experts_down(
    place: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    down: torch.Tensor,
    routing: list[torch.Tensor],
) -> torch.Tensor:
    """sum_k weights[t, k] down_{index[t, k]} activated[t, k]: [T, D]."""
    from ..routing_metadata import Routing
    from . import feed_forward

    index, weights, down = (contiguous(tensor) for tensor in (index, weights, down))
    return feed_forward.down(place, Tiles(codes, scales), index, weights, down, Routing(*routing))


@experts_narrow.register_fake
@experts_down.register_fake
def _(place, *others):
    return place.new_empty(place.shape)


experts_narrow.register_autograd(hand_on, setup_context=nothing_kept)
experts_down.register_autograd(hand_on, setup_context=nothing_kept)


@torch.library.custom_op("hf_moe::fp8_experts_backward", mutates_args=())
def experts_backward(
    grad: torch.Tensor,
    grad_narrowed: torch.Tensor | None,
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    low: torch.Tensor | None,
    widen: torch.Tensor | None,
    narrow: torch.Tensor | None,
    hidden_codes: torch.Tensor,
    hidden_scales: torch.Tensor,
    routing: list[torch.Tensor],
    activation: str,
    gated: bool,
    limit: float | None,
    shift: float,
    needs: list[bool],
) -> list[torch.Tensor]:
    """Gradients of those of NAMES that `needs` marks, in this order."""
    from ..routing_metadata import Routing
    from . import feed_forward

    return feed_forward.backward(
        grad.contiguous(),
        contiguous(grad_narrowed),
        *(contiguous(tensor) for tensor in (x, index, weights, up, down, low, widen, narrow)),
        Tiles(hidden_codes, hidden_scales),
        Routing(*routing),
        Formula(activation, gated, limit=limit, shift=shift),
        needs,
    )


@experts_backward.register_fake
def _(grad, grad_narrowed, x, index, *operands_and_needs):
    inputs = (x, *operands_and_needs[: len(NAMES) - 1])
    return [
        tensor.new_empty(tensor.shape) for tensor, need in zip(inputs, operands_and_needs[-1], strict=True) if need
    ]


def keep_experts(ctx, inputs, output):
    *ctx.formula, save = inputs[len(NAMES) + 1 :]
    _, _, _, _, codes, scales, _, a, b, c, d = output
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[: len(NAMES) + 1], codes, scales, a, b, c, d)
    ctx.saved = save


def backward_of_experts(ctx, grad, grad_narrowed, *_):
    if grad is None and grad_narrowed is None:
        return (None,) * (len(NAMES) + 6)
    assert ctx.saved, "hf_moe::fp8_experts_up ran with save=False, which keeps nothing for a backward pass"
    *operands, codes, scales, a, b, c, d = ctx.saved_tensors
    needed = ctx.needs_input_grad
    needs = [needed[0], *needed[2 : len(NAMES) + 1]]
    if grad is None:
        grad = torch.zeros_like(operands[0])
    routing = [a, b, c, d]
    gradients = iter(
        torch.ops.hf_moe.fp8_experts_backward(
            grad, grad_narrowed, *operands, codes, scales, routing, *ctx.formula, needs
        )
    )
    x, *others = (next(gradients) if need else None for need in needs)
    return x, None, *others, *[None] * 5


experts_up.register_autograd(backward_of_experts, setup_context=keep_experts)


def experts(
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    low: torch.Tensor | None,
    widen: torch.Tensor | None,
    narrow: torch.Tensor | None,
    formula: Formula,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """sum_k weights[t, k] FFN_{index[t, k]}(x[t]) [T, D] in FP8, and the weighted activations narrowed [T, K, r].

    x [T, D]; index (int64) and weights [T, K]; up [E, U, D] and down [E, D, I], U = 2I if `gated`, else I, D and I
    multiples of 128. An index outside [0, E) adds nothing. Of low ranks (..low_rank), which are not quantised: low
    [T, E, r] and widen [E, U, r] add widen_e low[t, e] to the up-projection, narrow is [E, r, I].
    """
    assert not formula.transposed and not formula.interleaved
    inputs = (x, weights, up, down, low, widen, narrow)
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    of_formula = (formula.activation, formula.gated, formula.limit, formula.shift)
    place, place_narrow, codes, scales, _, _, plain, a, b, c, d = experts_up(
        x, index, weights, up, down, low, widen, narrow, *of_formula, save
    )
    routing, below = [a, b, c, d], None
    if narrow is not None:  # before the large product, so that what it keeps is kept by then
        below = experts_narrow(place_narrow, plain, index, weights, down, narrow, routing)
    return experts_down(place, codes, scales, index, weights, down, routing), below
