"""Rows that max_length cuts, by what is cut of them and what is to become of them."""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from hf_moe.training.long_rows import fit

# Labels of four rows; x counts. Their lengths are 3, 6, 6 and 5.
PATTERNS = ["..x", "xx....", "....xx", "....."]
ROWS = Dataset.from_dict(
    {name: [[7 if mark == "x" else -100 for mark in row] for row in PATTERNS] for name in ("input_ids", "labels")}
)


def arguments(**changes) -> SimpleNamespace:
    given = {"max_length": 4, "truncation_mode": "keep_start", "packing_strategy": "bfd", "on_long_rows": "truncate"}
    return SimpleNamespace(**given | changes)


@pytest.mark.parametrize(
    ("changes", "packing", "kept", "said"),
    [
        ({}, False, [0, 1], "3 of 4 rows are longer than max_length 4: cut to it"),
        ({}, True, [0, 1], "2 of 4 rows have no token to learn from within max_length 4"),
        ({"truncation_mode": "keep_end"}, False, [0, 2], "3 of 4 rows are longer than max_length 4: cut to it"),
        ({"on_long_rows": "drop"}, False, [0], "3 of 4 rows are longer than max_length 4: left out"),
        ({"max_length": 6}, False, [0, 1, 2], "1 of 4 rows have no token to learn from within max_length 6"),
        ({"max_length": None}, False, [0, 1, 2], "1 of 4 rows have no token to learn from\n"),
        ({"packing_strategy": "wrapped"}, True, [0, 1, 2], "1 of 4 rows have no token to learn from\n"),
    ],
    ids=["cut", "packed", "keep-end", "drop", "none-longer", "no-limit", "cut-anywhere"],
)
def test_what_is_kept_and_said(changes, packing, kept, said, capsys):
    rows = fit(ROWS, "rows", arguments(**changes), packing)
    assert rows[:] == ROWS[kept]
    assert f"rows: {said}" in capsys.readouterr().err


def test_all_that_can_be_wrong():
    with pytest.raises(
        ValueError, match="rows: 2 of 4 rows are longer than max_length 5, the first of them row 1 with 6"
    ):
        fit(ROWS, "rows", arguments(on_long_rows="error", max_length=5), packing=False)
    with pytest.raises(ValueError, match="rows has no token to learn from within max_length 1"):
        fit(ROWS, "rows", arguments(max_length=1), packing=False)  # nothing predicts a first token
