"""Weights in FP8: quantised once a step, not once a micro-batch, where somebody holds them (see ..copies)."""

import torch
from torch import nn

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

    def begin(self) -> None:
        super().begin()
        HELD.update((weight.data_ptr(), weight) for weight in self.made)

    def end(self) -> None:
        super().end()
        for weight in self.made:
            HELD.pop(weight.data_ptr(), None)

    def make(self, weight: nn.Parameter, _) -> tuple[Blocks, Blocks]:
        self.made[weight] = None  # so that old and new are not there at a time
        return quantised(weight)


HELD: dict[int, nn.Parameter] = {}  # where a weight lies -> itself: checkpointing's backward has a detached one


def in_blocks(weight: torch.Tensor) -> tuple[Blocks, Blocks]:
    """What `quantised` makes of a weight, held since the step began if somebody holds it."""
    held = HELD.get(weight.data_ptr())
    return quantised(weight) if held is None or held.shape != weight.shape else HOLDERS[held].of(held)
