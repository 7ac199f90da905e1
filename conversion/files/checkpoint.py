"""Reading safetensors checkpoints by tensor name, without holding the model in memory.

Files are memory-mapped, so a tensor costs no memory of ours until something is computed from it. Everything a file
says about itself is checked when the checkpoint is opened, before a conversion writes its first byte.
"""

import json
import math
import mmap
import warnings
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import NamedTuple

import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}

# A weight of another type is a code that its config would have to explain, as `block_fp8.py` and `mxfp4.py` read it.
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Entry(NamedTuple):
    """One tensor of a file: where its bytes lie, counted from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    nbytes: int


def read_json(path: Path) -> dict:
    """The JSON object in `path`. Raises FileNotFoundError or a ValueError that names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(content).__name__}.")
    return content


def read_config(folder: Path) -> dict:
    """The config.json in `folder`. Raises as `read_json` does, and where a field to choose by has another type."""
    path = folder / "config.json"
    if not path.is_file() and (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is an adapter: give the whole model, which --lora_merge writes to {folder / 'merged'}."
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the folder of a saved model.")
    said = read_json(path)
    for name, kind in (("model_type", str), ("quantization_config", dict)):
        if said.get(name) is not None and not isinstance(said[name], kind):
            raise ValueError(f"{path} says {name}={said[name]!r}, which is no {kind.__name__}.")
    return said


def read_text(path: Path, characters: int = -1) -> str:
    """The text in `path`, or its beginning. Raises an OSError or a ValueError that names the file."""
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(characters)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}.") from None


def _unique(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} appears twice")
    return content


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor that a safetensors file holds, in the order of its bytes.

    Raises a ValueError where the header and the file do not agree: sizes, shapes, offsets, holes, a cut end.
    """
    if not path.is_file():
        raise FileNotFoundError(f"The weights file {path} does not exist.")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise ValueError(f"{path} is truncated or no safetensors file: {size} bytes, a header of {length}.")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has no valid safetensors header: {error}.") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} has no valid safetensors header: it is a {type(header).__name__}.")
    header.pop("__metadata__", None)

    entries = {name: _entry(path, name, said, 8 + length) for name, said in header.items()}
    entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].nbytes)))
    end = 8 + length
    for name, entry in entries.items():
        if entry.begin != end:
            raise ValueError(f"{path}: {name} begins at byte {entry.begin}, but the tensor before it ends at {end}.")
        end += entry.nbytes
    if end != size:
        what = "is truncated" if size < end else "has bytes that no tensor owns"
        raise ValueError(f"{path} {what}: its header describes {end} bytes, the file has {size}.")
    return entries


def _entry(path: Path, name: str, said: object, data_begin: int) -> Entry:
    def is_sizes(value):
        return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)

    if not isinstance(said, dict) or not is_sizes(said.get("shape")) or not is_sizes(said.get("data_offsets")):
        raise ValueError(f"{path}: the header entry of {name} is malformed.")
    if said.get("dtype") not in DTYPES:
        raise ValueError(f"{path}: {name} has dtype {said.get('dtype')!r}; known are {', '.join(DTYPES)}.")
    if len(said["data_offsets"]) != 2:
        raise ValueError(f"{path}: the header entry of {name} is malformed.")
    dtype, shape, (begin, end) = DTYPES[said["dtype"]], tuple(said["shape"]), said["data_offsets"]
    nbytes = math.prod(shape) * dtype.itemsize  # torch would count in 64 bits, and overflow
    if end - begin != nbytes:
        raise ValueError(
            f"{path}: {name} has shape {list(shape)} and dtype {said['dtype']}, which take {nbytes} bytes, but its "
            f"header gives it {end - begin}."
        )
    return Entry(dtype, shape, data_begin + begin, nbytes)


def read_index(folder: Path) -> dict[str, str]:
    """`weight_map` of a sharded checkpoint: tensor name -> file. Raises where a file would lie outside the folder."""
    path = folder / INDEX_FILE
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} has no weight_map.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file:
            raise ValueError(f"{path}: the file of {name} is {file!r}, not a name.")
        windows = PureWindowsPath(file)  # also knows the separators and roots of the others
        if windows.is_absolute() or windows.anchor or ".." in windows.parts or PurePosixPath(file).is_absolute():
            raise ValueError(f"{path} points outside the folder: {name} is said to be in {file!r}.")
    return weight_map


def check_inside(folder: Path, file: str | Path) -> None:
    """Raise a ValueError where `folder`/`file` is a link that leaves the folder.

    In the Hub's cache it may: there the files of `snapshots/<revision>` are links to `blobs`.
    """
    folder = folder.resolve()
    allowed = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    target = (folder / file).resolve()
    if not any(target.is_relative_to(place) for place in allowed):
        raise ValueError(f"{folder / file} is a link that leaves the folder, to {target}; put the file itself there.")


class Checkpoint:
    """The tensors of a checkpoint folder, by name: single-file or sharded safetensors.

    `entries` maps each name to what is known of it; `tensor(name)` is a view of the mapped file.
    Raises FileNotFoundError or a ValueError of one line for whatever is missing, cut, doubled or contradictory.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise FileNotFoundError(f"The checkpoint folder {folder} does not exist.")
        self.folder = folder
        if (folder / SINGLE_FILE).exists():  # first, as Transformers has it
            self.files, weight_map = [SINGLE_FILE], None
        elif (folder / INDEX_FILE).exists():
            weight_map = read_index(folder)
            self.files = sorted(set(weight_map.values()))
        else:
            raise FileNotFoundError(
                f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; hf_moe reads safetensors only, so save other "
                "formats as safetensors first."
            )
        self.entries: dict[str, Entry] = {}
        self.file_of: dict[str, str] = {}
        for file in self.files:
            check_inside(folder, file)
            for name, entry in read_header(folder / file).items():
                if name in self.entries:
                    raise ValueError(f"{name} is twice in {folder}: in {self.file_of[name]} and in {file}.")
                self.entries[name], self.file_of[name] = entry, file
        for name, file in (weight_map or {}).items():
            if self.file_of.get(name) != file:
                raise ValueError(f"{folder / INDEX_FILE} says that {name} is in {file}, but that file lacks it.")
        unlisted = sorted(set(self.entries) - set(weight_map or self.entries))
        if unlisted:
            raise ValueError(f"{unlisted[0]} is in {self.file_of[unlisted[0]]}, but {INDEX_FILE} does not list it.")
        self._maps: dict[str, mmap.mmap] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor as a read-only view of the mapped file: read when touched, never copied, not to be written to."""
        return self.view(self.entries[name], self.file_of[name])

    def computes(self, name: str) -> bool:
        """Whether the tensor takes memory, not being a view of the file."""
        return False

    def part(self, name: str, index: int, count: int) -> torch.Tensor:
        """Part `index` of the tensor, cut along its first axis into `count` equal ones."""
        return self.tensor(name).unflatten(0, (count, -1))[index]

    def view(self, entry: Entry, file: str) -> torch.Tensor:
        """The bytes of `entry` in `file` as a tensor."""
        if not entry.nbytes:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if file not in self._maps:
            with (self.folder / file).open("rb") as opened:
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        with warnings.catch_warnings():
            # A writable map would do without the warning, but Linux refuses one larger than the memory.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            flat = torch.frombuffer(self._maps[file], dtype=torch.uint8, count=entry.nbytes, offset=entry.begin)
        return flat.view(entry.dtype).view(entry.shape)

    def release(self) -> None:
        """Give the pages of the files that have been read back to the system, whose cache they stay in."""
        for mapped in self._maps.values() if hasattr(mmap, "MADV_DONTNEED") else ():  # which Windows lacks
            mapped.madvise(mmap.MADV_DONTNEED)

    @property
    def dtype(self) -> torch.dtype:
        """The floating dtype that most tensors have."""
        counts: dict[torch.dtype, int] = {}
        for entry in self.entries.values():
            if entry.dtype.is_floating_point:
                counts[entry.dtype] = counts.get(entry.dtype, 0) + entry.nbytes
        return max(counts, key=counts.get)
