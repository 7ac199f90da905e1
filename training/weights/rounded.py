"""Weights in autocast's type while texts are written: rounded once, where autocast would round them in every step."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def rounded(model: nn.Module, dtype: torch.dtype, exact: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, the float32 weights of `model` are in `dtype`, but for those of `exact`; then they are as they were.

    They are the same parameters, whose memory lies aside meanwhile: nobody may train them. What is of a class of its
    own, as a shard is, stays as it is.
    """
    kept = {id(x) for module in exact for x in module.parameters()}
    parts = [x for x in model.parameters() if type(x) is nn.Parameter and x.dtype == torch.float32]
    weights = [(x, x.data) for x in parts if id(x) not in kept]
    try:
        for parameter, weight in weights:
            parameter.data = weight.to(dtype)
        yield
    finally:
        for parameter, weight in weights:
            parameter.data = weight
