"""Writing safetensors checkpoints piece by piece."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from ...staging import Journal
from .checkpoint import DTYPES, INDEX_FILE

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK_BYTES = 1 << 24  # how much is written between two looks at the clock (and at Ctrl-C)


class Output(NamedTuple):
    """One tensor to write: `pieces()` yields tensors whose values, one after the other, are its rows.

    held: about how many bytes of memory a piece takes, with what it is made of; none if it is a view of a file. read:
    part i of n equal ones, its rows as one vector, where there is a way to have one without the others.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[torch.Tensor]]
    held: int = 0
    read: Callable[[int, int], torch.Tensor] | None = None

    def part(self, index: int, count: int) -> torch.Tensor:
        """Part `index` of `count` equal ones, its rows as one vector."""
        if self.read is not None:
            return self.read(index, count)
        return torch.cat([piece.reshape(-1) for piece in self.pieces()]).view(count, -1)[index]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Shard(NamedTuple):
    """One file to write: its bytes up to the data, and the tensors in the order of their bytes."""

    file: str
    header: bytes
    outputs: list[Output]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(output.nbytes for output in self.outputs)


def plan_shards(outputs: list[Output], max_shard_size: int | str) -> list[Shard]:
    """Cut the tensors, in their order, into files of at most `max_shard_size` ("5GB"), named as Transformers does.

    A tensor above the limit gets a file of its own. Raises a ValueError for a size that cannot be read.
    """
    by_name = {output.name: output for output in outputs}
    assert len(by_name) == len(outputs), "two outputs have one name"
    try:
        if str(max_shard_size).lstrip().startswith("-"):
            raise ValueError
        split = split_state_dict_into_shards_factory(
            by_name,
            get_storage_size=lambda output: output.nbytes,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except (ValueError, OverflowError):
        raise ValueError(f"max_shard_size {max_shard_size!r} is no size; write it like '5GB' or '200MB'.") from None
    return [_shard(file, [by_name[name] for name in names]) for file, names in split.filename_to_tensors.items()]


def _shard(file: str, outputs: list[Output]) -> Shard:
    # Wide types first: then every tensor lies at a multiple of its item size.
    outputs = sorted(outputs, key=lambda output: -output.dtype.itemsize)
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for output in outputs:
        begin, end = end, end + output.nbytes
        header[output.name] = {
            "dtype": DTYPE_NAMES[output.dtype],
            "shape": list(output.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return Shard(file, len(raw).to_bytes(8, "little") + raw, outputs)


def write_shards(folder: Path, shards: list[Shard], advance: Callable[[int], object], journal: Journal) -> None:
    """Write every shard that `journal` does not hold yet and, if there are several, the index.

    `advance(n)` hears of every n bytes written or found complete.
    """
    for shard in shards:
        if journal.holds(shard.file):
            advance(shard.nbytes)
        else:
            write_shard(folder, shard, advance)
            journal.record(shard.file)
    if len(shards) > 1:
        weight_map = {output.name: shard.file for shard in shards for output in shard.outputs}
        total = sum(output.nbytes for shard in shards for output in shard.outputs)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_shard(folder: Path, shard: Shard, advance: Callable[[int], object]) -> None:
    """Write one file to the disk. Raises an OSError that names the file, of a full disk say."""
    with (folder / shard.file).open("wb", buffering=0) as file:

        def write(data: memoryview) -> int:
            done = 0
            while done < len(data):
                chunk = data[done : done + CHUNK_BYTES]
                try:
                    step = file.write(chunk)
                except OSError as error:
                    raise type(error)(error.errno, f"{error.strerror}, while writing", str(file.name)) from None
                start_writeback(file.fileno(), file.tell() - step, step)
                done += step
                advance(step)
            return done

        write(memoryview(shard.header))
        for output in shard.outputs:
            written = 0
            for piece in output.pieces():
                written += write(_bytes(piece, output))
                del piece  # before the next is made
            assert written == output.nbytes, f"{output.name}: {written} bytes instead of {output.nbytes}"
        os.fsync(file.fileno())


def start_writeback(handle: int, begin: int, count: int) -> None:
    """Have the disk take what was just written, where the system can be asked to.

    Left alone, Linux lets the disk idle until a tenth of the memory is unwritten, and all that is then left has to be
    waited for at the end.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(handle, begin, count, os.POSIX_FADV_DONTNEED)


def _bytes(piece: torch.Tensor, output: Output) -> memoryview:
    assert piece.dtype == output.dtype, f"{output.name}: a piece is {piece.dtype}, not {output.dtype}"
    return memoryview(piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def check_space(folder: Path, nbytes: int) -> None:
    """Raise an OSError where the disk under `folder` has no room for `nbytes`."""
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise OSError(
            f"The output takes {nbytes / 1e9:.2f} GB, but the disk of {folder} has {free / 1e9:.2f} GB left: name "
            "another folder, or free some space."
        )
