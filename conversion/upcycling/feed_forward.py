"""The tensors of one dense feed-forward network."""

from collections.abc import Iterator, Mapping

import torch

from ..files.writer import Output


class FeedForward(Mapping):
    """The tensors of a dense feed-forward network by name ("up_proj.weight" [I, D]), each read when asked for."""

    def __init__(self, outputs: Mapping[str, Output]):
        self._outputs = outputs

    def __getitem__(self, part: str) -> torch.Tensor:
        pieces = list(self._outputs[part].pieces())
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).reshape(self._outputs[part].shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._outputs)

    def __len__(self) -> int:
        return len(self._outputs)

    def output(self, part: str) -> Output:
        return self._outputs[part]
