"""A linear layer whose products with its weight are computed in FP8: forward, and gradient of the input."""

import torch
from torch import nn

from ..low_rank import given
from ..precision import computed_in
from . import eager, operators

SIDE = 16  # a side of a weight is a multiple of it: bytes that the card moves at once
LEAST = 2**24  # numbers of a weight: smaller ones take longer than in bf16 (benchmarks/results/fp8_gpu_linear.json)


class Fp8Linear(nn.Linear):
    """x W^T + b with x in tiles and W in blocks of E4M3; what it adds, and what an adapter adds, is not quantised."""

    is_transposed = False  # to what gives an adapter's factors (low_rank.beside)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., out] of x [..., in], in the type that is computed in around it."""
        rows = x.to(computed_in(x, self.weight.dtype)).flatten(0, -2)
        output = product(rows, self.weight)
        if (factors := given(self).get("weight")) is not None:
            output = output + rows @ factors.a.to(rows.dtype).mT @ factors.b.to(rows.dtype).mT
        if self.bias is not None:
            output = output + self.bias.to(rows.dtype)
        return output.view(*x.shape[:-1], self.out_features)


def compute_in_fp8(linear: nn.Linear) -> None:
    """Make it an Fp8Linear where it stands: what was hooked to it or shards it knows it as it was."""
    linear.__class__ = Fp8Linear


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[T, out] of x [T, in]: by the kernels on a card, by their definition elsewhere."""
    return operators.linear(x, weight) if operators.computes(x) else eager.Linear.apply(x, weight)


def suits(module: nn.Module) -> bool:
    """Whether it is a linear layer, and not one of another kind, that can be computed in FP8."""
    return type(module) is nn.Linear and all(size % SIDE == 0 for size in module.weight.shape)
