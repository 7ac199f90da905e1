"""Texts of files, folders, Hub data sets and rows in memory, read piece by piece so that memory stays flat."""

import json
import reprlib
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
from transformers import PreTrainedTokenizerBase

from .chat import ROLES, conversation, render, unknown_role

PIECE = 32_768  # characters of a plain text that are tokenized together
ROW_FILES = {".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # after one of those
SAVED = ("dataset_dict.json", "state.json")  # one of them is in a folder of save_to_disk
COLUMNS = "text, messages, or prompt and completion"
Rows = Sequence[str | dict]  # texts in memory, or rows as files have them


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
