"""Files that hold other tensors than the model: each is put together where it is read, as Transformers does it."""

from collections.abc import Mapping
from pathlib import Path

import torch

from .checkpoint import Checkpoint
from .host import Conversion


class ConvertedCheckpoint(Checkpoint):
    """A checkpoint by the names that its tensors have in the model.

    names: of those that are stored as they are, in the files -> in the model. What one conversion makes is in memory
    together, until another is asked for.
    """

    def __init__(self, folder: Path, names: Mapping[str, str], conversions: list[Conversion]):
        super().__init__(folder)
        self._stored, self._file_of, self._conversions = self.entries, self.file_of, {}
        self.entries = {new: self._stored[name] for name, new in names.items()}
        self.file_of = {new: self._file_of[name] for name, new in names.items()}
        self._last: tuple[Conversion | None, dict[str, torch.Tensor]] = (None, {})
        for conversion in conversions:
            first = conversion.stored[0]
            for name, x in conversion.of(self._empty).items():
                self.entries[name] = self._stored[first]._replace(dtype=x.dtype, shape=tuple(x.shape), nbytes=x.nbytes)
                self.file_of[name], self._conversions[name] = self._file_of[first], conversion

    def _empty(self, name: str) -> torch.Tensor:
        return torch.empty(self._stored[name].shape, dtype=self._stored[name].dtype, device="meta")

    def _read(self, name: str) -> torch.Tensor:
        return self.view(self._stored[name], self._file_of[name])

    def computes(self, name: str) -> bool:
        return name in self._conversions

    def tensor(self, name: str) -> torch.Tensor:
        if name not in self._conversions:
            return super().tensor(name)
        conversion = self._conversions[name]
        if self._last[0] is not conversion:
            self._last = (conversion, conversion.of(self._read))
        return self._last[1][name]
