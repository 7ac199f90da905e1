"""MXFP4 weights, as gpt-oss is released (arXiv 2508.10925, 2.1): read as bfloat16, one expert at a time.

The format is that of the OCP Microscaling specification 1.0: 32 numbers of four bits (sign, two of exponent, one of
mantissa) share a power of two. `<name>_blocks` [E, rows, columns / 32, 16] holds two numbers a byte, the low half
first, and `<name>_scales` [E, rows, columns / 32] the exponents plus 127. Both stand for each expert's matrix as it is
multiplied, [rows, columns]; unquantized, gpt-oss stores `<name>` [E, columns, rows].
"""

from pathlib import Path

import torch

from .checkpoint import Checkpoint

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = torch.tensor([*MAGNITUDES, *(-x for x in MAGNITUDES)])
NAN_SCALE = 255
BLOCK_BYTES = 16


def dequantized(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """blocks [rows, groups, 16] uint8 and scales [rows, groups] uint8 as bfloat16 [rows, 32 groups], exactly."""
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)  # [rows, groups, 32]
    powers = torch.ldexp(torch.ones(scales.shape), scales.int() - 127)
    powers[scales == NAN_SCALE] = torch.nan
    return (VALUES[codes.int()] * powers.unsqueeze(-1)).bfloat16().flatten(-2)


class MXFP4Checkpoint(Checkpoint):
    """A checkpoint whose pairs of blocks and scales show as the bfloat16 tensors they stand for."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._stored = dict(self.entries)
        self._last: tuple[str, int] | None = None  # an expert's matrix may be asked for in parts
        for blocks in [name for name in self._stored if name.endswith("_blocks")]:
            name = blocks.removesuffix("_blocks")
            entry, scales = self.entries.pop(blocks), self.entries.pop(f"{name}_scales", None)
            if scales is None:
                raise ValueError(f"The checkpoint lacks {name}_scales, the exponents of {blocks}.")
            fits = len(entry.shape) == 4 and entry.shape[3] == BLOCK_BYTES and scales.shape == entry.shape[:3]
            if not fits or {entry.dtype, scales.dtype} != {torch.uint8}:
                raise ValueError(
                    f"{blocks} is {entry.dtype} of shape {list(entry.shape)}, its scales are {scales.dtype} of shape "
                    f"{list(scales.shape)}; MXFP4 calls for bytes of shapes [E, rows, groups, {BLOCK_BYTES}] and "
                    "[E, rows, groups]."
                )
            if name in self.entries:
                raise ValueError(f"The checkpoint holds {name} twice: as it is and in MXFP4.")
            self.file_of[name] = self.file_of[blocks]
            experts, rows, groups, _ = entry.shape
            self.entries[name] = entry._replace(
                dtype=torch.bfloat16, shape=(experts, 2 * BLOCK_BYTES * groups, rows), nbytes=4 * entry.nbytes
            )

    def computes(self, name: str) -> bool:
        return name not in self._stored

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as a view of the mapped file, or what its blocks stand for."""
        if name in self._stored:
            return super().tensor(name)
        return torch.stack([self._matrix(name, expert).mT for expert in range(self.entries[name].shape[0])])

    def part(self, name: str, index: int, count: int) -> torch.Tensor:
        if name in self._stored or count != self.entries[name].shape[0]:
            return super().part(name, index, count)
        return self._matrix(name, index).mT.unsqueeze(0)

    def _matrix(self, name: str, expert: int) -> torch.Tensor:
        if self._last != (name, expert):
            blocks, scales = (
                self.view(self._stored[stored], self.file_of[stored])[expert]
                for stored in (f"{name}_blocks", f"{name}_scales")
            )
            self._last, self._kept = (name, expert), dequantized(blocks, scales)
        return self._kept
