"""Rows of tokens that `max_length` cuts: counted, and cut, left out or refused, as the recipe says."""

import sys

import numpy as np
import pyarrow as pa
from datasets import Dataset
from trl import SFTConfig

ON_LONG_ROWS = {"truncate": "cut to it", "drop": "left out", "error": "refused"}


def fit(rows: Dataset, name: str, args: SFTConfig, packing: bool) -> Dataset:
    """The rows (`input_ids`, `labels`) that have something to learn from within `max_length`; says what it left out.

    TRL does the cutting, when it packs or truncates. Raises ValueError if no row is left, or if `on_long_rows` is
    error and a row is longer.
    """
    cuts = args.max_length is not None and (not packing or args.packing_strategy == "bfd")
    parts = [measure(table, args, cuts) for table in rows.with_format("arrow").iter(batch_size=10_000)]
    lengths, learned = (np.concatenate(part) for part in zip(*parts, strict=True))
    long = lengths > args.max_length if cuts else np.zeros(len(rows), dtype=bool)
    keep = learned > 0
    if long.any():
        found = f"{name}: {long.sum()} of {len(rows)} rows are longer than max_length {args.max_length}"
        if args.on_long_rows == "error":
            row = int(long.argmax())
            raise ValueError(
                f"{found}, the first of them row {row} with {lengths[row]} tokens: raise --max_length, or say "
                "--on_long_rows truncate or drop."
            )
        print(f"{found}: {ON_LONG_ROWS[args.on_long_rows]}", file=sys.stderr)
        if args.on_long_rows == "drop":
            keep &= ~long
    within = f" within max_length {args.max_length}" if cuts else ""
    if not keep.any():
        longer = "raise --max_length, or " if cuts else ""
        raise ValueError(f"{name} has no token to learn from{within}: {longer}give rows with an answer, or text.")
    nothing = int((learned == 0).sum())
    if nothing:
        print(f"{name}: {nothing} of {len(rows)} rows have no token to learn from{within}", file=sys.stderr)
    return rows if keep.all() else rows.select(np.flatnonzero(keep))


def measure(table: pa.Table, args: SFTConfig, cuts: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of each row, its length and how many of its labels count after truncation."""
    labels = table["labels"].combine_chunks()
    lengths = labels.value_lengths().to_numpy(zero_copy_only=False)
    stops = np.cumsum(lengths)
    first, last = stops - lengths, stops
    if cuts and args.truncation_mode == "keep_end":
        first = np.maximum(first, last - args.max_length)
    elif cuts:
        last = np.minimum(last, first + args.max_length)
    counted = np.concatenate([[0], np.cumsum(labels.flatten().to_numpy() != -100)])
    return lengths, counted[last] - counted[np.minimum(first + 1, last)]  # nothing predicts the first
