"""Texts to look at a model with: files, folders and Hub data sets, read piece by piece so that memory stays flat."""

import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import torch
from transformers import PreTrainedTokenizerBase

from hf_moe.chat import ROLES, conversation, render, unknown_role

PIECE = 32_768  # characters of a plain text that are tokenized together
SORTED = 64  # windows that are sorted by length before they are put together, for less padding
ROW_FILES = {".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # after one of those
SAVED = ("dataset_dict.json", "state.json")  # one of them is in a folder of save_to_disk
COLUMNS = "text, messages, or prompt and completion"
Rows = Sequence[str | dict]  # texts in memory, or rows as files have them


class Batch(NamedTuple):
    ids: torch.Tensor  # [B, S], padded on the right
    mask: torch.Tensor  # [B, S], 0 on padding


class Domain:
    """One source of text: `windows` gives its first `max_tokens` tokens, and can be asked again."""

    def __init__(
        self, name: str, source: str | Rows, tokenizer: PreTrainedTokenizerBase, window: int, max_tokens: int | None
    ):
        self.name, self.source = name, source
        self.said = source if isinstance(source, str) else f"{name} ({len(source)} texts)"
        self.tokenizer, self.window, self.max_tokens = tokenizer, window, max_tokens

    def windows(self) -> Iterator[list[int]]:
        """Token ids, at most `window` at a time; no window reaches over the end of a text."""
        left = self.max_tokens
        for text in texts(self.source, self.tokenizer):
            ids = self.tokenizer(text, verbose=False).input_ids if text.strip() else []
            ids = ids[:left]
            for start in range(0, len(ids), self.window):
                yield ids[start : start + self.window]
            if left is not None:
                left -= len(ids)
                if left <= 0:
                    return

    def batches(self, tokens: int) -> Iterator[Batch]:
        """The windows, together up to about `tokens` places a batch."""
        for windows in chunks(self.windows(), SORTED):
            yield from together(windows, tokens)

    def count(self, vocab_size: int) -> torch.Tensor:
        """How often each token id occurs, [V] int64. Reads everything, so that what is broken shows before the model
        runs.

        Raises ValueError for a text without tokens and for ids that the model does not know.
        """
        counts = torch.zeros(vocab_size, dtype=torch.long, device="cpu")
        for ids in self.windows():
            if max(ids) >= vocab_size:
                raise ValueError(f"The tokenizer gives token {max(ids)}, the model knows {vocab_size}.")
            counts += torch.bincount(torch.tensor(ids, device="cpu"), minlength=vocab_size)
        if not counts.any():
            raise ValueError(f"{self.said} holds no text: not one token to trace.")
        return counts


def together(windows: list[list[int]], tokens: int) -> Iterator[Batch]:
    """Windows of about the same length in batches of up to about `tokens` places."""
    rows = []
    for ids in sorted(windows, key=len):
        if rows and len(ids) * (len(rows) + 1) > tokens:
            yield padded(rows)
            rows = []
        rows.append(ids)
    yield padded(rows)


def padded(rows: list[list[int]]) -> Batch:
    """Rows of token ids as one batch; 0 stands on padding, where the mask is 0."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device="cpu")
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device="cpu")
    return Batch(ids, mask)


def chunks(items: Iterator, size: int) -> Iterator[list]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def named_sources(data: Sequence[str | Path] | Mapping[str, str | Path | Rows]) -> dict[str, str | Rows]:
    """Name of each domain -> its source: "NAME=SOURCE", or as much of the end of the path as tells them apart.

    A mapping has the names already.
    """
    if not data:
        raise ValueError("There is no text to trace: give --data FILE or a data set.")
    if isinstance(data, Mapping):
        return {str(name): str(source) if isinstance(source, Path) else source for name, source in data.items()}
    named = {}
    for entry in data:
        name, equals, source = str(entry).partition("=")
        if not (equals and name and source) or Path(entry).expanduser().exists():
            name, source = None, str(entry)
        if source in named:
            raise ValueError(f"{source} is given twice; each --data is a domain of its own.")
        named[source] = name
    paths = {source: Path(source).with_suffix("").parts for source, name in named.items() if name is None}
    for source, parts in paths.items():
        size = 1
        while size < len(parts) and any(
            other[-size:] == parts[-size:] for key, other in paths.items() if key != source
        ):
            size += 1
        named[source] = "/".join(parts[-size:])
    names = list(named.values())
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two domains are called {name}; name them with --data NAME=FILE.")
    return {name: source for source, name in named.items()}


def texts(source: str | Rows, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The texts of a file, a folder, a Hub data set or rows. Raises FileNotFoundError or ValueError of one line."""
    if not isinstance(source, str):
        for number, row in enumerate(source, 1):
            where = f"Row {number}"
            yield unicode(row if isinstance(row, str) else row_text(row, tokenizer, where), where)
        return
    path = Path(source).expanduser()
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    if path.is_file() and path.suffix == ".zst" and find_spec("zstandard") is None:
        raise ValueError(f"{source} is compressed by zstd: pip install zstandard.")
    if path.is_file() and suffix == ".jsonl":
        rows = json_lines(path)
    elif path.is_file() and suffix in ROW_FILES:
        rows = data_set_rows(source, ROW_FILES[suffix], data_files=str(path))
    elif path.is_file():
        yield from plain_text(path)
        return
    elif path.is_dir():
        rows = data_set_rows(source, str(path))
    elif path.is_absolute() or source.startswith(".") or source.count("/") != 1 or path.suffix:
        raise FileNotFoundError(f"There is no file {source}, and it is no data set's name such as owner/name.")
    else:
        rows = data_set_rows(source, source)
    for number, row in enumerate(rows, 1):
        where = f"{source}, row {number}"
        yield unicode(row_text(row, tokenizer, where), where)


def unicode(text: str, where: str) -> str:
    """The text. Raises ValueError for half of a surrogate pair, which JSON can write and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):x}"
        raise ValueError(f"{where} has half of a surrogate pair, {half}, at character {error.start}.") from error
    return text


def plain_text(path: Path) -> Iterator[str]:
    """A file in pieces that end where a line ends."""
    with fsspec.open(str(path), "rt", encoding="utf-8", compression="infer") as file:
        try:
            while piece := file.readlines(PIECE):
                yield "".join(piece)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text in UTF-8: {error.reason} at byte {error.start}.") from error


def json_lines(path: Path) -> Iterator[Any]:
    with fsspec.open(str(path), "rb", compression="infer") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise ValueError(f"{path}, line {number} is no JSON: {error}.") from error


def data_set_rows(source: str, *args, **kwargs) -> Iterator[dict]:
    """The rows of split "train", or of the only split, one after the other, without what is null in their objects.

    Parquet and Arrow give each object the keys of all others.
    """
    from datasets import Dataset, load_dataset, load_from_disk
    from datasets.exceptions import DatasetNotFoundError

    try:
        if any((Path(args[0]) / name).is_file() for name in SAVED):
            splits = load_from_disk(args[0])
            splits = {"train": splits} if isinstance(splits, Dataset) else splits
        else:
            splits = load_dataset(*args, streaming=True, **kwargs)
        if "train" not in splits and len(splits) > 1:
            raise ValueError(f"it has no split train, but {', '.join(splits)}; save the one you mean as a file")
        for row in splits.get("train", next(iter(splits.values()))):
            yield {name: without_nulls(value) for name, value in row.items()}
    except StopIteration:  # what datasets says of an empty JSON file
        raise ValueError(f"{source} holds no text: a JSON file there is empty.") from None
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"{source} is neither a file nor a folder here, nor a data set on the Hub.") from error
    except (ValueError, ConnectionError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{source} cannot be read as rows: {reason:.300}.") from error


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    return [without_nulls(part) for part in value] if isinstance(value, list) else value


def row_text(row: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """The text of a row; messages go through the chat template."""
    row = row if isinstance(row, dict) else {}
    if isinstance(row.get("text"), str):
        return row["text"]
    talk = next((name for name in ("messages", "conversations") if name in row), None)
    parts = [row[talk]] if talk else [row.get("prompt"), row.get("completion")]
    if all(isinstance(part, str) for part in parts):
        return "".join(parts)
    if "text" in row and parts == [None, None]:
        raise ValueError(f"{where} has {reprlib.repr(row['text'])} in the column text, which is no text.")
    if not all(isinstance(part, list) and part for part in parts):
        raise ValueError(f"{where} has the columns {', '.join(row) or 'of no object'}; expected {COLUMNS}.")
    if not tokenizer.chat_template:
        raise ValueError(f"{where} is a conversation, and the model's tokenizer has no chat template.")
    try:
        messages = conversation([message for part in parts for message in part])
    except ValueError as error:
        raise ValueError(f"{where}: {error}.") from error
    if (role := unknown_role(messages, tokenizer.get_chat_template())) is not None:
        raise ValueError(
            f"{where} has the role {role!r}, which is none of {', '.join(ROLES)} (or human, gpt), and which the chat "
            "template does not name."
        )
    return render(tokenizer, messages, where)
