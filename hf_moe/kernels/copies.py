"""Copies of the experts' float32 weights in the type that is computed in: one a step, not one a micro-batch.

Autocast casts a weight anew in each forward, and again where layers are recomputed. While weights stand still, from a
step's first micro-batch until the optimizer moves, one copy serves them all. Whoever holds copies says when that is.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary


def copied(model: nn.Module, accumulation: int, checkpointing: bool) -> list[nn.Parameter]:
    """The experts' weights in float32 that a step of `model` computes with more than once."""
    if accumulation == 1 and not checkpointing:
        return []
    return [x for x in model.parameters() if type(x) is nn.Parameter and x.dim() == 3 and x.dtype == torch.float32]


def sent(weight: torch.Tensor) -> int:
    """Bytes of a weight as FSDP2 sends it under autocast: trained experts in bfloat16."""
    return weight.numel() * (2 if weight.dim() == 3 and weight.requires_grad else weight.element_size())


def travelling(model: nn.Module) -> int:
    """Bytes of the model's weights as FSDP2 sends them."""
    return sum(map(sent, model.parameters()))


class Copies:
    """Of `weights` in `dtype`: made when first asked for between `begin` and `end`, which keeps their memory.

    `sums`: gradients go to `grad` in the pass that casts them. That is for a process of its own, as hooks on the
    accumulation of gradients, which distributed training has, would miss them.
    """

    def __init__(self, weights: Iterable[nn.Parameter], dtype: torch.dtype, sums: bool = False):
        self.dtype, self.sums = dtype, sums
        self.made = WeakIdKeyDictionary(dict.fromkeys(weights))
        self.fresh: set[int] = set()

    def begin(self) -> None:
        """Weights stand still from here on."""
        self.fresh.clear()
        for weight in self.made:
            HOLDERS[weight] = self

    def end(self) -> None:
        """They are about to move: copies are old."""
        for weight in self.made:
            HOLDERS.pop(weight, None)

    def of(self, weight: nn.Parameter):
        if id(weight) not in self.fresh:
            self.fresh.add(id(weight))
            with torch.no_grad():
                self.made[weight] = self.make(weight, self.made[weight])
        return self.made[weight]

    def make(self, weight: nn.Parameter, old: torch.Tensor | None) -> torch.Tensor:
        """A copy, in the memory of the old one."""
        copy = torch.empty_like(weight, dtype=self.dtype, requires_grad=False) if old is None else old
        return copy.copy_(weight)


HOLDERS = WeakIdKeyDictionary()  # weight -> the copies that hold it now


class Copy(torch.autograd.Function):
    """What `weight.to(dtype)` is, read from a copy."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor, copy: torch.Tensor, sums: bool) -> torch.Tensor:
        ctx.weight, ctx.sums = weight, sums
        return copy.detach()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        if not ctx.sums or ctx.weight.grad is None:
            return gradient.to(ctx.weight.dtype), None, None
        add(ctx.weight.grad, gradient)
        return None, None, None


def add(total: torch.Tensor, part: torch.Tensor) -> None:
    """total += part, of two types: in one pass at the speed of memory, which PyTorch's kernel has half of."""
    if total.device.type == "cuda" and total.is_contiguous() and part.is_contiguous():
        from .sums import add_to

        add_to(total, part)
    else:
        total.add_(part)


def cast(weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The weight in `dtype`: its copy, where one is held."""
    if weight is None or weight.dtype == dtype:
        return weight
    holder = None if torch.compiler.is_compiling() else HOLDERS.get(weight)
    if holder is None or holder.dtype != dtype:
        return weight.to(dtype)
    return Copy.apply(weight, holder.of(weight), holder.sums)
