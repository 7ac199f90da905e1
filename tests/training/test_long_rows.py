"""Rows that max_length cuts, by what is cut of them and what is to become of them."""

from types import SimpleNamespace

import pytest
from datasets import Dataset
from hf_moe.training.data.long_rows import fit
from hf_moe.training.trainers.sft_trainer import MoeSFTConfig, MoeSFTTrainer

from .conftest import tiny_hf_moe, tiny_tokenizer

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


@pytest.mark.parametrize(
    ("streamed", "message"),
    [
        (True, "on_long_rows is error, but train_data is streamed"),
        (False, "train_data: 3 of 4 rows are longer than max_length 4, the first of them row 1 with 6"),
    ],
    ids=["streamed", "with-labels"],
)
def test_trainer_lets_no_long_row_through(tmp_path, streamed, message):
    rows = ROWS.to_iterable_dataset() if streamed else ROWS
    args = MoeSFTConfig(
        str(tmp_path), max_length=4, on_long_rows="error", max_steps=1, use_cpu=True, bf16=False, report_to="none"
    )
    with pytest.raises(ValueError, match=message):
        MoeSFTTrainer(model=tiny_hf_moe(), args=args, train_dataset=rows, processing_class=tiny_tokenizer())
