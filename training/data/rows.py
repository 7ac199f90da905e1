"""Rows for training: files, folders and Hub data sets, checked and in one form before anything heavy is loaded."""

import glob
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset, load_dataset_builder
from datasets import load_from_disk as load_saved
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from hf_moe.chat import CALLS, ROLES, conversation

from .json_text import JsonText, encoded, values

BUILDERS = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".txt": "text",
}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")  # after one of those
BROKEN = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)  # what their readers raise
SAVED = ("dataset_dict.json", "state.json")  # one of them is in a folder of save_to_disk
# What TRL reads beside the rows themselves.
EXTRA_COLUMNS = ("tools", "chat_template_kwargs")
CONVERSATIONS = ("messages", "conversations")  # columns that are never text
MEDIA = ("image", "images", "video", "videos", "audio", "audios")  # columns that models of text cannot read
WHO = ("role", "from")
FIELDS = (*WHO, "content", "value")
JSON_VALUE = r"^(?:[\[{]|-?\d+(?:\.\d+)?$|true$|false$)"  # that is no text
PLAIN = List({"role": Value("string"), "content": Value("string")})  # messages of nothing else
OBJECTS = List(JsonText())  # messages with more to them


def load_rows(
    sources: list[str],
    *,
    split: str,
    config: str | None = None,
    text_field: str = "text",
    what: str = "train_data",
    kinds: tuple[tuple[str, ...], ...] | None = None,
) -> Dataset:
    """The rows of `sources`: files, or one folder or Hub data set with `config` and `split`; only columns TRL reads.

    Conversations are in the column messages, of roles that chat templates know and contents of text; see hf_moe.chat.

    kinds: the columns that can make a row, the first that are there count; None: those of supervised fine-tuning.
    Raises FileNotFoundError where there is no such file or data set, ValueError where rows are not what TRL expects.
    """
    kinds = kinds or (("messages",), ("conversations",), ("prompt", "completion"), (text_field,))
    label = f"{what} {' '.join(sources)}"
    try:
        rows = read(sources, label, split, config)
    except ValueError as error:
        rows = read_one_by_one(sources, split, config, label, error)
    if len(rows) == 0:
        raise ValueError(f"{label} has no rows.")
    columns = row_columns(rows.column_names, kinds, label)
    check_text_alone(rows, label)
    check_utf8(rows, label)
    names = [*columns, *(name for name in EXTRA_COLUMNS if name in rows.column_names)]
    if others := [name for name in rows.column_names if name not in names]:
        print(f"{label}: rows are {' and '.join(columns)}; not read: {', '.join(others):.300}", file=sys.stderr)
    form = Features({name: form_of(rows, name, label) for name in names})
    check_alike(rows, columns, label)
    flat = all(is_flat(rows.features[name]) for name in names)
    if not flat or any(holds_json(rows.data.column(name)) for name in columns):
        rows = as_written(rows, names, sources, split, config, label)
    if all(is_ready(rows, name) for name in names):
        return rows.select_columns(names)
    return rewritten(rows.select_columns(names), form, label)


# ---- reading ----


def read(sources: list[str], label: str, split: str, config: str | None) -> Dataset:
    paths = [Path(source).expanduser() for source in sources]
    if len(paths) == 1 and not paths[0].is_file() and builder(paths[0]) is None:
        splits = load(label, str(paths[0]) if paths[0].is_dir() else sources[0], config)
        if isinstance(splits, Dataset):
            return splits
        if split not in splits:
            raise ValueError(f"{label} has no split {split}; its splits are {', '.join(splits)}.")
        return splits[split]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{label}: there is no file {path}.")
        if path.stat().st_size == 0:
            raise ValueError(f"{label}: {path} is empty.")
    builders = {builder(path) for path in paths}
    if len(builders) > 1 or None in builders:
        suffixes = sorted({path.suffix for path in paths})
        raise ValueError(f"{label}: files must all end in one of {', '.join(BUILDERS)}, but end in {suffixes}.")
    return load(label, *builders, data_files=[glob.escape(str(path)) for path in paths])["train"]


def builder(path: Path) -> str | None:
    """What of `datasets` reads a file of this name, compressed or not."""
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    return BUILDERS.get(suffix.lower())


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    return any((folder / name).is_file() for name in SAVED)


def load(label: str, *args, **kwargs) -> DatasetDict | Dataset:
    """`load_dataset`, or `load_from_disk` for what it saved, with errors in one line that names the rows."""
    try:
        return load_saved(args[0]) if is_saved(Path(args[0])) else load_dataset(*args, **kwargs)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"{label} is neither a file nor a folder here, nor a data set on the Hub.") from error
    except FileNotFoundError as error:  # of `datasets`, whose patterns take brackets for more than letters
        hint = ", and a folder's name may have no brackets" if "[" in args[0] else ""
        raise FileNotFoundError(f"{label} holds no files that end in {', '.join(BUILDERS)}{hint}.") from error
    except (DatasetGenerationError, ImportError, ValueError, *BROKEN) as error:
        raise unreadable(label, error) from error


def unreadable(label: str, error: Exception) -> ValueError:
    """In one line, why rows cannot be read."""
    reason = str(error.__cause__ or error).strip().splitlines() or [type(error.__cause__ or error).__name__]
    install = ": pip install zstandard" if "zstd not supported" in reason[0] else ""
    return ValueError(f"{label} cannot be read as rows: {reason[0]:.300}{install}")


def as_written(
    rows: Dataset, names: list[str], sources: list[str], split: str, config: str | None, label: str
) -> Dataset:
    """The rows that `read` has found with the values of JSON files as they stand there; others as they are.

    Reading these, `datasets` takes a text for the JSON in it where some rows have objects in its place, and rounds;
    of a long file whose first rows have text, it makes all that comes later text.
    """
    if rows.info.builder_name != "json" or is_saved(Path(sources[0])):
        return rows
    files = json_files(sources, split, config)
    try:
        return from_json(files, names)
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, json.JSONDecodeError):  # one object over several lines, with a list a column
            return rows
        raise unreadable(label, error) from error


def read_one_by_one(sources: list[str], split: str, config: str | None, label: str, error: ValueError) -> Dataset:
    """The rows of JSON files whose later ones have other fields or kinds than the first, on which `datasets` settles.

    Raises `error`, what `read` has raised, for all else, and ValueError with the line for what is no JSON.
    """
    if not isinstance(error.__cause__, DatasetGenerationError) or not (files := json_files(sources, split, config)):
        raise error
    try:
        names = next(objects(files)).keys()
    except (StopIteration, AttributeError, ValueError, *BROKEN):
        raise error from None
    try:
        return from_json(files, [*names])
    except DatasetGenerationError as other:
        raise unreadable(label, other) from other


def from_json(files: tuple[tuple, ...], names: list[str]) -> Dataset:
    features = Features(dict.fromkeys(names, JsonText()))
    return Dataset.from_generator(objects, features=features, gen_kwargs={"files": files, "names": tuple(names)})


def json_files(sources: list[str], split: str, config: str | None) -> tuple[tuple, ...]:
    """The files of JSON that rows come from, none where it is not JSON; with what changes if they do."""
    paths = [Path(source).expanduser() for source in sources]
    if paths[0].is_file():
        found = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        return tuple(found) if builder(paths[0]) == "json" else ()
    source = str(paths[0]) if paths[0].is_dir() else sources[0]
    found = load_dataset_builder(source, config)
    return tuple((str(file),) for file in found.config.data_files[split]) if found.info.builder_name == "json" else ()


def objects(files: tuple[tuple, ...], names: tuple[str, ...] | None = None) -> Iterator[dict[str, Any]]:
    """The objects of JSON files, one a line, or a list of them: all there is, or fields of these names.

    Raises a JSONDecodeError with the line, or a ValueError with the number of what is no object.
    """
    for path, *_ in files:
        with fsspec.open(path, encoding="utf-8-sig", mode="rt", compression="infer") as file:
            first = file.readline()
            listed = first.lstrip().startswith("[")
            rows = json.loads(first + file.read()) if listed else json_lines(chain((first,), file), path)
            for number, row in enumerate(rows):
                if names is not None and not isinstance(row, dict):
                    raise ValueError(f"{path}: row {number} is {kind(row)}, but must be an object with {names[0]}")
                yield row if names is None else {name: row.get(name) for name in names}


def json_lines(lines: Iterable[str], path: str) -> Iterator[Any]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise json.JSONDecodeError(f"{path}: line {number} is no JSON: {error.msg}", line, error.pos) from None


# ---- what the rows are ----


def row_columns(found: list[str], kinds: tuple[tuple[str, ...], ...], label: str) -> tuple[str, ...]:
    """The columns that make a row, out of those `found`: the first kind that is complete."""
    for kind in kinds:
        if set(kind) <= set(found):
            return kind
    expected = " or ".join(" and ".join(kind) for kind in kinds)
    raise ValueError(f"{label} has the columns {', '.join(found)}; expected {expected}.")


def check_text_alone(rows: Dataset, label: str) -> None:
    """Raises ValueError for a row with an image, a sound or a film beside its text, which nothing here would use."""
    for name in MEDIA:
        if name in rows.column_names:
            column = rows.data.column(name)
            there = pc.is_valid(column)
            if isinstance(rows.features[name], List):
                there = pc.greater(pc.fill_null(pc.list_value_length(column), 0), 0)
            if (row := pc.index(there, True).as_py()) >= 0:
                raise ValueError(
                    f"{label}: row {row} has a value in the column {name}, but models here read text alone: leave "
                    "out such rows."
                )


def check_utf8(rows: Dataset, label: str) -> None:
    """Raises ValueError where text is in another encoding, which the readers of JSON and Parquet let through."""
    try:
        rows.data.validate(full=True)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{label} has text that is not UTF-8 ({error}): save it as UTF-8.") from error


def form_of(rows: Dataset, name: str, label: str) -> Any:
    """The feature that a column is to have: of its first row, whether it is text or messages."""
    first, fields = rows[0][name], getattr(rows.features[name], "feature", None)
    if name in EXTRA_COLUMNS:
        return JsonText()
    if isinstance(first, str) and name not in CONVERSATIONS:
        return Value("string")
    if isinstance(first, list):
        texts = isinstance(fields, dict) and fields.keys() <= set(FIELDS)
        roles = [fields[key] for key in WHO if key in fields] if texts else []
        plain = texts and all(map(is_text, roles)) and not has_calls(rows.data.column(name))
        return PLAIN if plain else OBJECTS
    if first is None:
        raise ValueError(f"{label}: row 0 has no {name}.")
    expected = "a list of messages" if name in CONVERSATIONS else "text or a list of messages"
    raise ValueError(f"{label}: {name} must be {expected}, but is {type(first).__name__}.")


def has_calls(column: pa.ChunkedArray) -> bool:
    """Whether some message of a column, whose roles are text, is a call by its role, and gets more to it."""
    messages = pc.list_flatten(column)
    who = [field.name for field in messages.type if field.name in WHO]
    return any(
        str(role).lower() in CALLS for key in who for role in pc.unique(pc.struct_field(messages, key)).to_pylist()
    )


def is_flat(feature: Any) -> bool:
    """Whether there is nothing in a column but text, or messages of two texts."""
    fields = getattr(feature, "feature", None)
    parts = fields.values() if isinstance(fields, dict) and fields.keys() <= set(FIELDS) else [feature]
    return all(map(is_text, parts))


def is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def holds_json(column: pa.ChunkedArray) -> bool:
    """Whether some text of a column of texts, or of messages of texts, may have been a value of another kind."""
    if not pa.types.is_list(column.type) and not pa.types.is_large_list(column.type):
        return pc.any(pc.match_substring_regex(column, JSON_VALUE)).as_py() or False
    messages = pc.list_flatten(column)
    return any(holds_json(pc.struct_field(messages, field.name)) for field in messages.type)


def is_ready(rows: Dataset, name: str) -> bool:
    """Whether a column is text, or messages of known roles and with contents of text, and no value is missing."""
    column, feature = rows.data.column(name), rows.features[name]
    if name in EXTRA_COLUMNS or name == "conversations" or not is_flat(feature) or column.null_count:
        return False
    if feature != PLAIN:
        return isinstance(feature, Value)
    messages = pc.list_flatten(column)
    role, content = (pc.struct_field(messages, key) for key in ("role", "content"))
    return (
        pc.min(pc.list_value_length(column)).as_py() > 0
        and not messages.null_count + role.null_count + content.null_count
        and set(pc.unique(role).to_pylist()) <= set(ROLES)
    )


def rewritten(rows: Dataset, form: Features, label: str) -> Dataset:
    """The rows with the features of `form`, and conversations by the name messages.

    Raises ValueError for the first row with a value that is missing, of another kind than the first row's, or none
    that chat templates could read.
    """
    rows = rows.with_format("arrow").map(
        Rewriting(rows.features, form, label),
        batched=True,
        with_indices=True,
        features=form,
        desc=f"Reading {label.split()[0]}",
    )
    return rows.with_format(None).rename_columns({"conversations": "messages"} if "conversations" in form else {})


class Rewriting:
    """A table of rows to columns of another form; see `rewritten`."""

    def __init__(self, found: Features, form: Features, label: str):
        self.found, self.form, self.label = found, form, label

    def __call__(self, table: pa.Table, indices: list[int]) -> dict[str, list]:
        return {
            name: [
                encoded(self.value(name, value, row), self.form[name])
                for value, row in zip(values(table[name], self.found[name]), indices, strict=True)
            ]
            for name in self.form
        }

    def value(self, name: str, value: Any, row: int) -> Any:
        where = f"{self.label}: row {row}"
        if name in EXTRA_COLUMNS:
            return extra(name, value, where)
        if value is None or value == []:
            raise ValueError(f"{where} has no {name}.")
        if isinstance(self.form[name], Value):
            if not isinstance(value, str):
                raise ValueError(f"{where} has {kind(value)} as its {name}, but the rows before it have text.")
            return value
        if isinstance(value, str) and name not in CONVERSATIONS:
            raise ValueError(f"{where} has text as its {name}, but the rows before it have a list of messages.")
        try:
            return conversation(value)
        except ValueError as error:
            raise ValueError(f"{where}: {name}: {error}.") from error


def extra(name: str, value: Any, where: str) -> Any:
    """What the chat template gets beside the messages: a list of tools, or more of its variables."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {name} is text that is not JSON: {error}.") from error
    if name == "chat_template_kwargs" and not isinstance(value, dict | None):
        raise ValueError(f"{where}: {name} must be an object, but is {kind(value)}.")
    return value or {} if name == "chat_template_kwargs" else value


def kind(value: Any) -> str:
    return "a list of messages" if isinstance(value, list) else f"a {type(value).__name__}"


def check_alike(rows: Dataset, names: tuple[str, ...], label: str) -> None:
    """Raises ValueError where some of the columns that make a row are text and others messages.

    But for the prompt of pairs of messages, which UltraFeedback has as text.
    """
    kinds = {name: "messages" if isinstance(rows[0][name], list) else "text" for name in names if name != "answer"}
    if kinds == {"prompt": "text", "chosen": "messages", "rejected": "messages"}:
        return
    if len(set(kinds.values())) > 1:
        found = " and ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise ValueError(f"{label}: {found}, but all must be the same.")


def is_conversational(rows: Dataset) -> bool:
    """Whether rows hold messages, which a chat template turns into text."""
    return any(isinstance(value, list) for name, value in rows[0].items() if name not in EXTRA_COLUMNS)
