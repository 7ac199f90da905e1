"""The experts that tokens take, told to who listens, by a recorded step, too, which calls no module that has a hook.

Kernels that choose experts tell them. A router tells them by a hook that has an attribute TELLS, which is in no
recording's way.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

TELLS = "tells_choice"
Heard = dict[nn.Module, list[torch.Tensor]]  # router -> the experts [T, K] of each forward
LISTENERS: list[Heard] = []


def tell(router: nn.Module, index: torch.Tensor) -> None:
    """A router's tokens take the experts `index` [T, K]; E and more is none."""
    for heard in LISTENERS:
        heard.setdefault(router, []).append(index)


@contextmanager
def listening(alone: bool = False) -> Iterator[Heard]:
    """Hear of every forward inside, replayed ones too, router by router; `alone`, nobody else does."""
    heard, before = {}, LISTENERS.copy()
    LISTENERS[:] = [heard] if alone else [*before, heard]
    try:
        yield heard
    finally:
        LISTENERS[:] = before
