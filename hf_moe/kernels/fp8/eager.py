"""The definition of FP8 training, in PyTorch: operands are quantised, and their values multiplied in float32.

DeepSeek-V3, https://arxiv.org/abs/2412.19437, 3.3. Of a product's gradients only the input's is in FP8: that of the
weight, which sums over tokens, would have to quantise both of its operands again. It runs anywhere, slowly; the
kernels have to agree with it.
"""

import torch

from ..formula import ACTIVATIONS, Formula
from .copies import in_blocks
from .format import Tiles, tiles_of


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """In float32, whatever autocast says."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right


class Linear(torch.autograd.Function):
    """x [T, K] by a weight [N, K]: the products with the weight have operands in FP8."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return product(tiles_of(x).values(), in_blocks(weight)[0].values()[0].T)[: len(x)].to(x.dtype)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad
        grad_x = grad_weight = None
        if need_x:
            values = tiles_of(grad).values()
            grad_x = product(values, in_blocks(weight)[0].values()[0])[: len(grad)].to(grad.dtype)
        if need_weight:
            grad_weight = product(grad.float().T, x.float()).to(weight.dtype)
        return grad_x, grad_weight


def activate(hidden: torch.Tensor, formula: Formula) -> torch.Tensor:
    """[R, I] of the up-projection [R, U]: see `Formula`."""
    act = ACTIVATIONS[formula.activation]
    if not formula.gated:
        return act(hidden)
    gate, up = hidden.chunk(2, -1)
    if formula.limit is not None:
        gate, up = gate.clamp(max=formula.limit), up.clamp(-formula.limit, formula.limit)
    return act(gate) * (up + formula.shift)


class Experts(torch.autograd.Function):
    """sum_k weights[t, k] FFN_{index[t, k]}(x[t]) [T, D], and the weighted activations narrowed [T, K, r].

    The arguments are those of operators.experts.
    Kept are x, and the up-projection in FP8; activations are computed again from it (V3, 3.3.3).
    """

    @staticmethod
    def forward(ctx, x, index, weights, up, down, low, widen, narrow, formula: Formula):
        values, up_values, down_values = (y.values() for y in (tiles_of(x), in_blocks(up)[0], in_blocks(down)[0]))
        output, kept = torch.zeros_like(x, dtype=torch.float32), []
        narrowed = None if narrow is None else x.new_zeros(*index.shape, narrow.shape[1])
        for expert in range(len(up)):
            token, choice = torch.where(index == expert)
            weight = weights[token, choice, None]
            hidden = product(values[token], up_values[expert].T)
            if low is not None:
                hidden += product(low[token, expert].float(), widen[expert].float().T)
            kept += tiles_of(hidden)
            activated = activate(hidden, formula)
            if narrow is not None:
                below = product(activated.to(x.dtype).float(), narrow[expert].float().T)
                narrowed[token, choice] = (below.to(x.dtype) * weight).to(x.dtype)
            activated = tiles_of(activated).values()[: len(token)]
            rows = product(activated, down_values[expert].T).to(x.dtype)
            output.index_add_(0, token, rows.float() * weight)
        ctx.formula = formula
        ctx.save_for_backward(x, index, weights, up, down, low, widen, narrow, *kept)
        return output.to(x.dtype), narrowed

    @staticmethod
    def backward(ctx, grad: torch.Tensor, grad_narrowed: torch.Tensor | None):
        x, index, weights, up, down, low, widen, narrow, *kept = ctx.saved_tensors
        of_output = tiles_of(grad).values()
        up_values, down_values = in_blocks(up)[0].values(), in_blocks(down)[0].values()
        grad_x = torch.zeros_like(grad, dtype=torch.float32)
        grad_weights, grad_up, grad_down, grad_low, grad_widen, grad_narrow = (
            None if tensor is None else torch.zeros_like(tensor) for tensor in (weights, up, down, low, widen, narrow)
        )
        for expert in range(len(up)):
            token, choice = torch.where(index == expert)
            hidden = Tiles(*kept[2 * expert : 2 * expert + 2]).values()[: len(token)].requires_grad_()
            with torch.enable_grad():
                activated = activate(hidden, ctx.formula)
            from_output = product(of_output[token], down_values[expert])
            if narrow is not None:
                of_narrowed = grad_narrowed[token, choice].float()
                from_output += product(of_narrowed, narrow[expert].float())
            grad_weights[token, choice] = (from_output * activated).sum(-1).to(weights.dtype)
            weight = weights[token, choice, None].float()
            (grad_hidden,) = torch.autograd.grad(activated, hidden, weight * from_output)
            weighted = weight * activated.detach()
            if narrow is not None:
                grad_narrow[expert] = product(of_narrowed.T, weighted)
            if low is not None:
                grad_widen[expert] = product(grad_hidden.T, low[token, expert].float())
                grad_low[:, expert].index_add_(0, token, product(grad_hidden, widen[expert].float()).to(low.dtype))
            grad_down[expert] = product(grad[token].float().T, weighted)
            grad_up[expert] = product(grad_hidden.T, x[token].float())
            values = tiles_of(grad_hidden).values()[: len(token)]
            grad_x.index_add_(0, token, product(values, up_values[expert]).to(grad.dtype).float())
        return grad_x.to(grad.dtype), None, grad_weights, grad_up, grad_down, grad_low, grad_widen, grad_narrow, None
