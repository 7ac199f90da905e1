"""LoRA on fused experts without a delta of their size: W + s B A is W, and two products of the rank.

PEFT wraps an expert's weight [E, out, in] in a parametrization that makes the sum of all experts anew in each forward,
and its whole gradient in the backward. Here A and B [E, r, in] and [E, out, r] stay apart:

- up: every token is multiplied by A of all experts in one dense product, [T, E r]; B's part is added where the kernel
  sums its tile.
- down: the activations are narrowed by A, weighted, and set into [T, E r], which B of all experts widens in one dense
  product.

Frozen experts then have no gradient, no product for one, and nothing is kept for it. LoRA: https://arxiv.org/abs/2106.09685.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

GIVEN = "hf_moe_low_rank"  # attribute of a module of experts: name of a weight -> its factors


class Factors(NamedTuple):
    """A [E, r, in] and B [E, out, r], the scaling within B."""

    a: torch.Tensor
    b: torch.Tensor


@contextmanager
def beside(experts: nn.Module, name: str, lhs: torch.Tensor, rhs: torch.Tensor, scaling: float) -> Iterator[None]:
    """Inside, `experts`, of which the kernels must compute, add scaling lhs rhs to the weight `name`."""
    # Of weights that are stored as [E, in, out] the factors are, too.
    a, b = (lhs.mT, rhs.mT * scaling) if experts.is_transposed else (rhs, lhs * scaling)
    given = vars(experts).setdefault(GIVEN, {})
    given[name] = Factors(a, b)
    try:
        yield
    finally:
        del given[name]


def given(experts: nn.Module) -> dict[str, Factors]:
    return vars(experts).get(GIVEN) or {}


def lowered(x: torch.Tensor, factors: Factors) -> torch.Tensor:
    """[T, E, r]: A_e x_t of every expert."""
    return (x @ factors.a.flatten(0, 1).to(x.dtype).mT).view(len(x), *factors.a.shape[:2])


def widened(narrowed: torch.Tensor, index: torch.Tensor, factors: Factors) -> torch.Tensor:
    """[T, D]: sum_k B_{index_{t,k}} narrowed_{t,k}, of narrowed [T, K, r]."""
    experts, size, rank = factors.b.shape
    every = narrowed.new_zeros(len(index), experts, rank)
    every = every.scatter_add(1, places(index, every), narrowed)
    return every.flatten(1) @ factors.b.to(narrowed.dtype).mT.reshape(experts * rank, size)


def places(index: torch.Tensor, every: torch.Tensor) -> torch.Tensor:
    """Where the chosen experts [T, K] are in `every` [T, E, r]; what is no expert has no row, and so adds 0."""
    return index.clamp(0, every.shape[1] - 1).unsqueeze(-1).expand(-1, -1, every.shape[2])
