"""Where a run's rows come from: sources of training rows with weights, held-out rows together or source by source."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from transformers import Trainer, TrainingArguments

from ..output.resuming import check_same_rows
from .json_text import JsonText
from .mixture import check_weights
from .rows import EXTRA_COLUMNS, OBJECTS, load_rows, rewritten


@dataclass
class DataArguments:
    """Where the rows are. Columns: messages, conversations, prompt and completion, or dataset_text_field."""

    train_data: list[str] | None = field(
        default=None, metadata={"help": "Files (.jsonl, .json, .parquet), or one folder or Hub data set."}
    )
    train_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "A weight for each entry of train_data, which are then sources of their own (files, folders, Hub "
            "data sets): each row comes from one of them with probability weight / sum. A source that runs out begins "
            "anew; an epoch ends when each has been gone through. Default: all entries are one set of rows."
        },
    )
    eval_data: list[str] | None = field(default=None, metadata={"help": "The same for the held-out rows."})
    eval_by_source: bool = field(
        default=False,
        metadata={
            "help": "Evaluate each entry of eval_data by itself: eval_NAME_loss, of its file's or folder's name."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_split: str = field(default="train", metadata={"help": "Split of a folder or a Hub data set."})
    eval_split: str = field(default="validation", metadata={"help": "Split of a folder or a Hub data set."})


def load_sources(
    data_args: DataArguments, args: TrainingArguments, **columns
) -> tuple[dict[str, Dataset], dict[str, Dataset]]:
    """Training and held-out rows, by what to call them; `columns` tells `load_rows` what makes a row.

    One source, unless `train_weights` or `eval_by_source` take the entries of `train_data` or `eval_data` apart.
    Leaves in `args.rows` what they hold. Raises ValueError as `check_same_rows` where a run is resumed.
    """
    check_weights(data_args.train_data, data_args.train_weights)
    if not data_args.eval_data and args.eval_strategy != "no":
        raise ValueError(f"eval_strategy is {args.eval_strategy.value}: give --eval_data, or --eval_strategy no.")
    train = {"train_data": data_args.train_data}
    if data_args.train_weights is not None:
        train = {f"train_data {source}": [source] for source in data_args.train_data}
    held_out = {"eval_data": data_args.eval_data} if data_args.eval_data else {}
    if data_args.eval_by_source and data_args.eval_data:
        held_out = source_names(data_args.eval_data)
    common = {"config": data_args.dataset_config, **columns}
    sources = {name: load_rows(paths, split=data_args.train_split, **common) for name, paths in train.items()}
    sources = alike(sources)
    held_out = {
        name: load_rows(paths, split=data_args.eval_split, what="eval_data", **common)
        for name, paths in held_out.items()
    }
    args.rows = described("train_data", sources) | described("eval_data", held_out)
    if getattr(args, "resumed", None) is not None:
        check_same_rows(args.resumed, args)
    return sources, held_out


def described(what: str, sources: dict[str, Dataset]) -> dict[str, dict]:
    """How many rows each source has, and a digest of them."""
    names = [what] if len(sources) == 1 else [f"{what} {number}" for number in range(1, len(sources) + 1)]
    return {
        name: {"rows": len(rows), "digest": digest(rows)} for name, rows in zip(names, sources.values(), strict=True)
    }


def digest(rows: Dataset, start: bytes = b"") -> str:
    """Of the contents of all rows, in order, after `start`."""
    found = hashlib.blake2b(start, digest_size=16)
    for table in rows.with_format("arrow").iter(batch_size=10_000):
        for batch in table.combine_chunks().to_batches():
            found.update(batch.serialize())
    return found.hexdigest()


def alike(sources: dict[str, Dataset]) -> dict[str, Dataset]:
    """Rows that are to be mixed with the same columns of the same form.

    Raises ValueError where they are not of one kind: TRL looks at the first for all.
    """
    kinds = {name: [x for x in rows.column_names if x not in EXTRA_COLUMNS] for name, rows in sources.items()}
    (first, expected), *others = kinds.items()
    for name, kind in others:
        if kind != expected:
            raise ValueError(
                f"{first} has rows of {' and '.join(expected)}, {name} of {' and '.join(kind)}: sources that are "
                "mixed need the same columns."
            )
    features = [rows.features for rows in sources.values()]
    if all(found == features[0] for found in features):
        return sources
    form = Features({name: common_form(name, features) for found in features for name in found})
    return {name: rewritten(with_columns(rows, form), form, name) for name, rows in sources.items()}


def common_form(name: str, features: list[Features]) -> Any:
    found = [x[name] for x in features if name in x]
    return JsonText() if name in EXTRA_COLUMNS else Value("string") if isinstance(found[0], Value) else OBJECTS


def with_columns(rows: Dataset, form: Features) -> Dataset:
    """The rows with a column of nulls for each that they lack."""
    for name in form.keys() - rows.features.keys():
        rows = rows.add_column(name, [None] * len(rows), feature=form[name])
    return rows


def source_names(sources: list[str]) -> dict[str, list[str]]:
    """Each source by the name of its file or folder, which its metrics carry. ValueError for two of one."""
    named = {Path(source).stem: [source] for source in sources}
    if len(named) < len(sources):
        raise ValueError(f"eval_by_source needs sources of different names, but eval_data is {', '.join(sources)}.")
    return named


def together(held_out: dict[str, Dataset], by_source: bool) -> Dataset | dict[str, Dataset] | None:
    """Held-out rows as a Trainer takes them."""
    return (held_out or None) if by_source else held_out.get("eval_data")


def by_label(sources: dict[str, Dataset], held_out: dict[str, Dataset]) -> dict[str, Dataset]:
    """All rows, by what messages call them."""
    return sources | {label(name): rows for name, rows in held_out.items()}


def label(name: str) -> str:
    """How messages call held-out rows: of all of eval_data, or of the source of that name."""
    return name if name == "eval_data" else f"eval_data {name}"


def loss_names(trainer: Trainer) -> dict[str, str]:
    """What the trainer calls the losses of its held-out rows -> what to call them in a sentence."""
    rows = trainer.eval_dataset
    if isinstance(rows, dict):
        return {f"eval_{name}_loss": f"held-out loss of {name}" for name in rows}
    return {"eval_loss": "held-out loss"}
