"""Rows for training: JSON lines, folders and Hub data sets, checked before anything heavy is loaded."""

from pathlib import Path

import pyarrow.compute as pc
from datasets import Dataset, DatasetDict, Value, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
# What TRL reads beside the rows themselves.
EXTRA_COLUMNS = ("tools", "chat_template_kwargs")


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

    kinds: the columns that can make a row, the first that are there count; None: those of supervised fine-tuning.
    Raises FileNotFoundError where there is no such file or data set, ValueError where rows are not what TRL expects.
    """
    kinds = kinds or (("messages",), ("conversations",), ("prompt", "completion"), (text_field,))
    label = f"{what} {' '.join(sources)}"
    rows = read(sources, label, split, config)
    if len(rows) == 0:
        raise ValueError(f"{label} has no rows.")
    columns = row_columns(rows.column_names, kinds, label)
    check_values(rows, columns, label)
    return rows.select_columns([*columns, *(name for name in EXTRA_COLUMNS if name in rows.column_names)])


def read(sources: list[str], label: str, split: str, config: str | None) -> Dataset:
    paths = [Path(source).expanduser() for source in sources]
    if len(paths) == 1 and not paths[0].is_file() and paths[0].suffix not in BUILDERS:
        splits = load(label, str(paths[0]) if paths[0].is_dir() else sources[0], config)
        if split not in splits:
            raise ValueError(f"{label} has no split {split}; its splits are {', '.join(splits)}.")
        return splits[split]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{label}: there is no file {path}.")
        if path.stat().st_size == 0:
            raise ValueError(f"{label}: {path} is empty.")
    suffixes = sorted({path.suffix for path in paths})
    if len(suffixes) > 1 or suffixes[0] not in BUILDERS:
        raise ValueError(f"{label}: files must all end in one of {', '.join(BUILDERS)}, but end in {suffixes}.")
    return load(label, BUILDERS[suffixes[0]], data_files=[str(path) for path in paths])["train"]


def load(label: str, *args, **kwargs) -> DatasetDict:
    """`load_dataset`, with its errors in one line that names the rows."""
    try:
        return load_dataset(*args, **kwargs)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"{label} is neither a file nor a folder here, nor a data set on the Hub.") from error
    except (DatasetGenerationError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{label} cannot be read as rows: {reason}") from error


def row_columns(found: list[str], kinds: tuple[tuple[str, ...], ...], label: str) -> tuple[str, ...]:
    """The columns that make a row, out of those `found`: the first kind that is complete."""
    for kind in kinds:
        if set(kind) <= set(found):
            return kind
    expected = " or ".join(" and ".join(kind) for kind in kinds)
    raise ValueError(f"{label} has the columns {', '.join(found)}; expected {expected}.")


def check_values(rows: Dataset, columns: tuple[str, ...], label: str) -> None:
    """Every row has a value, no conversation is empty, and all is text or messages that TRL reads.

    Where a column's type says that its values are text, the first row tells the rest.
    """
    for name in columns:
        column = rows.data.column(name)
        bad = pc.is_null(column)
        if isinstance(rows[0][name], list):
            bad = pc.or_(bad, pc.equal(pc.fill_null(pc.list_value_length(column), 0), 0))
        row = pc.index(bad, True).as_py()
        if row >= 0:
            raise ValueError(f"{label}: row {row} has no {name}.")
        for value in [rows[0][name]] if holds_text(rows.features[name], name) else rows[name]:
            check_shape(value, name, label)
    kinds = {name: "messages" if isinstance(rows[0][name], list) else "text" for name in columns if name != "answer"}
    if len(set(kinds.values())) > 1:
        found = " and ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise ValueError(f"{label}: {found}, but all must be the same.")


def holds_text(feature, name: str) -> bool:
    """Whether the type of a column leaves nothing but text, or messages of text."""
    fields = getattr(feature, "feature", None)
    texts = [fields.get(key) for key in message_keys(name)] if isinstance(fields, dict) else [feature]
    return all(isinstance(text, Value) and text.dtype in ("string", "large_string") for text in texts)


def message_keys(name: str) -> tuple[str, str]:
    return ("from", "value") if name == "conversations" else ("role", "content")


def check_shape(value, name: str, label: str) -> None:
    who, what = message_keys(name)
    if isinstance(value, list):
        for message in value:
            needed = {who} if isinstance(message, dict) and message.get("tool_calls") else {who, what}
            if not isinstance(message, dict) or not needed <= message.keys():
                raise ValueError(f"{label}: each entry of {name} needs {who} and {what}; found {message!r}.")
            if not isinstance(message[who], str) or not isinstance(message.get(what), str | list | None):
                raise ValueError(f"{label}: {who} and {what} of {name} must be text; found {message!r}.")
    elif name in ("messages", "conversations"):
        raise ValueError(f"{label}: {name} must be a list of messages, but is {type(value).__name__}.")
    elif not isinstance(value, str):
        raise ValueError(f"{label}: {name} must be text or a list of messages, but is {type(value).__name__}.")


def is_conversational(rows: Dataset) -> bool:
    """Whether rows hold messages, which a chat template turns into text."""
    return any(isinstance(value, list) for name, value in rows[0].items() if name not in EXTRA_COLUMNS)
