"""Upcycling strategies: what the experts of one layer are, given its dense feed-forward network.

A strategy takes the tensors of the dense network by name ("up_proj.weight" [I, D], ...: read-only views of the file),
the number of experts and a seeded generator, and yields one expert after the other under the same names. It is called
once for each tensor that is written, with the generator in the same state each time.
"""

from collections.abc import Callable, Iterator, Mapping

import torch

from .copy import copy

FeedForward = Mapping[str, torch.Tensor]
Strategy = Callable[[FeedForward, int, torch.Generator], Iterator[FeedForward]]

UPCYCLERS: dict[str, Strategy] = {
    "copy": copy,
}
