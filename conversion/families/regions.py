"""Which part of which of a family's tensors each part of an hf_moe tensor is: the same for import and export."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

EXPERT = "{expert}"


class Stacked(NamedTuple):
    """A tensor of all experts in which an expert's matrix is not as hf_moe has it.

    transposed: each matrix lies transposed. rows: those of the matrix that are meant, such as every second one; None:
    those that follow the rows of earlier parts. flat: the matrices lie one under the other in a tensor of two axes.
    """

    name: str
    transposed: bool = False
    rows: slice | None = None
    flat: bool = False


class Wrapped(NamedTuple):
    """A tensor with one more axis in front, of size 1, than hf_moe's has."""

    name: str


class Common(NamedTuple):
    """A tensor that each expert has a copy of in hf_moe."""

    name: str


# hf_moe tensor -> the tensors whose rows, one after the other, are its rows; with {expert}, Stacked or Common, each
# expert's. Where there are none, the family has only what 0 is.
# A tensor that stands in the rows of several hf_moe tensors holds theirs, one after the other.
Part = str | Stacked | Wrapped | Common
Row = tuple[Part, ...]
Rows = Mapping[str, Row]


class Region(NamedTuple):
    """Some rows of one block of a family's tensor `name` of `shape`; an expert's matrix is a block."""

    name: str
    shape: tuple[int, ...]
    block: int
    blocks: int
    block_shape: tuple[int, ...]
    transposed: bool
    rows: slice

    def of(self, block: torch.Tensor) -> torch.Tensor:
        """A view of the region within its `block`."""
        block = block.view(self.block_shape)
        return (block.mT if self.transposed else block)[self.rows]

    @property
    def is_block(self) -> bool:
        """Whether there is nothing else in the block, and that as hf_moe has it."""
        return not self.transposed and self.rows == slice(0, self.block_shape[0])


def part_name(part: Part) -> str:
    return part if isinstance(part, str) else part.name


def per_expert(row: Row) -> bool:
    return any(isinstance(part, Stacked | Common) or EXPERT in part_name(part) for part in row)


def regions(
    shapes: Mapping[str, tuple[int, ...]], row: Callable[[str], Row], num_experts: int
) -> dict[str, list[Region]]:
    """For each hf_moe tensor of `shapes` the regions whose rows, one after the other, are its rows.

    `row` gives a tensor's row of the table. All regions of a tensor are of one size.
    """
    parts: dict[str, list[tuple]] = {}
    filled: dict[tuple[str, int], int] = {}  # rows of each block so far
    for target, shape in shapes.items():
        stored = row(target)
        experts, matrix = (num_experts, shape[1:]) if per_expert(stored) else (1, shape)
        count, rest = matrix[0] // max(len(stored), 1), matrix[1:]
        parts[target] = []
        for expert in range(experts):
            for part in stored:
                stacked = isinstance(part, Stacked)
                name = part_name(part).replace(EXPERT, str(expert))
                block = (name, expert if stacked else 0)
                begin = 0 if isinstance(part, Common) else filled.get(block, 0)
                filled[block] = begin + count
                meant = part.rows if stacked and part.rows else slice(begin, begin + count)
                parts[target].append((block, part, meant, rest))

    def region(block: tuple[str, int], part: Part, meant: slice, rest: tuple[int, ...]) -> Region:
        stacked = part if isinstance(part, Stacked) else Stacked(part_name(part))
        blocks = num_experts if isinstance(part, Stacked) else 1
        matrix = (filled[block], *rest)
        if stacked.transposed:
            matrix = matrix[::-1]
        shape = matrix if blocks == 1 else (blocks, *matrix)
        if isinstance(part, Wrapped):
            shape = (1, *matrix)
        if stacked.flat:
            shape = (blocks * matrix[0], *matrix[1:])
        return Region(block[0], shape, block[1], blocks, matrix, stacked.transposed, meant)

    return {target: [region(*found) for found in founds] for target, founds in parts.items()}
