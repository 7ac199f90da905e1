"""Weights in FP8: quantised once a step, not once a micro-batch, where somebody holds them (see ..copies)."""

import torch

from ..copies import HOLDERS, Copies
from .format import CODE, Blocks, blocks_of


def quantised(weight: torch.Tensor) -> tuple[Blocks, Blocks]:
    """A weight [M, N] or [E, M, N] in blocks, and its transpose: E4M3 is multiplied along last axes alone."""
    weight = weight.detach().view(-1, *weight.shape[-2:])
    if weight.is_cuda:
        from . import quantise

        return quantise.blocks_of(weight)
    blocks = blocks_of(weight)
    return blocks, Blocks(*(x.mT.contiguous() for x in blocks))


class BlockCopies(Copies):
    """Of weights in FP8. They take as much as copies in bfloat16, of which there is no need then."""

    def __init__(self, weights):
        super().__init__(weights, CODE)

    def make(self, weight: torch.Tensor, _) -> tuple[Blocks, Blocks]:
        return quantised(weight)


def in_blocks(weight: torch.Tensor) -> tuple[Blocks, Blocks]:
    """What `quantised` makes of a weight, held since the step began if somebody holds it."""
    holder = HOLDERS.get(weight)
    return holder.of(weight) if isinstance(holder, BlockCopies) else quantised(weight)
