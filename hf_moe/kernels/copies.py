"""Copies of the experts' float32 weights in the type that is computed in: one a step, not one a micro-batch.

Autocast casts a weight anew in each forward, and again where layers are recomputed. While weights stand still, from a
step's first micro-batch until the optimizer moves, one copy serves them all. Whoever holds copies says when that is.
"""

from collections.abc import Iterable

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary


class Copies:
    """Of `weights` in `dtype`: made when first asked for between `begin` and `end`, which keeps their memory."""

    def __init__(self, weights: Iterable[nn.Parameter], dtype: torch.dtype):
        self.dtype = dtype
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

    def of(self, weight: nn.Parameter) -> torch.Tensor:
        if self.made[weight] is None:
            self.made[weight] = torch.empty_like(weight, dtype=self.dtype, requires_grad=False)
        if id(weight) not in self.fresh:
            self.fresh.add(id(weight))
            with torch.no_grad():
                self.made[weight].copy_(weight)
        return self.made[weight]


HOLDERS = WeakIdKeyDictionary()  # weight -> the copies that hold it now


class Copy(torch.autograd.Function):
    """What `weight.to(dtype)` is, read from a copy."""

    @staticmethod
    def forward(ctx, weight: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        ctx.dtype = weight.dtype
        return copy.detach()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad.to(ctx.dtype), None


def cast(weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The weight in `dtype`: its copy, where one is held."""
    if weight is None or weight.dtype == dtype:
        return weight
    holder = None if torch.compiler.is_compiling() else HOLDERS.get(weight)
    return weight.to(dtype) if holder is None or holder.dtype != dtype else Copy.apply(weight, holder.of(weight))
