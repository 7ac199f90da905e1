"""Rows from several sources by weight: shares, order, what happens at a source's end; held-out rows by source."""

import numpy as np
import pytest
from datasets import Dataset
from hf_moe.training.data.mixture import mix
from hf_moe.training.data.sources import DataArguments, label, load_sources, together
from transformers import TrainingArguments

from .conftest import write_rows


def sources(*sizes: int) -> dict[str, Dataset]:
    names = "abc"[: len(sizes)]
    return {
        name: Dataset.from_dict({"text": [f"{name}{i}" for i in range(n)]})
        for name, n in zip(names, sizes, strict=True)
    }


def test_one_source_is_itself():
    (rows,) = sources(5).values()
    assert mix({"a": rows}, None, seed=0) is rows


def test_shares_are_the_weights_and_each_source_keeps_its_order(capsys):
    mixed = mix(sources(700, 300), [3, 1], seed=0)["text"][:]
    drawn = {name: [text for text in mixed if text[0] == name] for name in "ab"}
    share = len(drawn["a"]) / len(mixed)
    assert abs(share - 0.75) < 4 * np.sqrt(0.75 * 0.25 / len(mixed))
    for name, size in (("a", 700), ("b", 300)):  # again from its first row, once it has run out
        assert drawn[name] == [f"{name}{i % size}" for i in range(len(drawn[name]))]
    assert min(len(drawn["a"]) / 700, len(drawn["b"]) / 300) == 1  # the end: the last source has been gone through
    assert "a: 75.0% of the rows, each about " in capsys.readouterr().err


def test_expected_share_is_exactly_the_weight():
    """Over many seeds, of tiny sources, where ending at a certain row could bias it: E[rows of a] = share E[rows]."""
    counts = np.array(
        [[sum(t[0] == "a" for t in m), len(m)] for m in (mix(sources(2, 3), [1, 3], s)["text"][:] for s in range(60))]
    )
    surplus = counts[:, 0] - 0.25 * counts[:, 1]
    assert abs(surplus.mean()) < 4 * surplus.std() / np.sqrt(len(surplus))


def test_a_seed_decides():
    orders = [mix(sources(9, 9, 9), [1, 2, 3], seed)["text"][:] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize(
    ("data", "weights", "message"),
    [
        (["a", "b"], [1], "train_weights has 1 numbers for 2 sources of train_data"),
        (["a", "b"], [1, 0], "train_weights gives 0 to b; weights are positive"),
        (["a", "b"], [1, float("nan")], "train_weights gives nan to b"),
        (["a", "a"], [1, 2], "train_weights needs sources that differ, but train_data is a, a"),
    ],
    ids=["count", "zero", "nan", "twice"],
)
def test_weights_that_are_refused_before_anything_is_read(tmp_path, data, weights, message):
    with pytest.raises(ValueError, match=message):
        load_sources(DataArguments(train_data=data, train_weights=weights), TrainingArguments(tmp_path))


def test_sources_of_two_kinds(tmp_path):
    rows = [{"text": "a"}], [{"prompt": "a", "completion": "b"}]
    paths = [str(write_rows(tmp_path / f"{i}.jsonl", x)) for i, x in enumerate(rows)]
    message = (
        "0.jsonl has rows of text, train_data .*1.jsonl of prompt and completion: sources that are mixed need the"
    )
    with pytest.raises(ValueError, match=message):
        load_sources(DataArguments(train_data=paths, train_weights=[1, 1]), TrainingArguments(tmp_path))


def test_sources_of_their_own(tmp_path):
    paths = [str(write_rows(tmp_path / f"{name}.jsonl", [{"text": name}] * 3)) for name in ("math", "chat")]
    args = TrainingArguments(tmp_path)
    train, held_out = load_sources(DataArguments(train_data=paths, eval_data=paths), args)
    assert [*train] == ["train_data"] and len(train["train_data"]) == 6
    assert len(together(held_out, False)) == 6
    given = DataArguments(train_data=paths, train_weights=[1, 2], eval_data=paths, eval_by_source=True)
    train, held_out = load_sources(given, args)
    assert [*train] == [f"train_data {path}" for path in paths]
    assert {name: rows[0]["text"] for name, rows in together(held_out, True).items()} == {
        "math": "math",
        "chat": "chat",
    }
    assert [label(name) for name in held_out] == ["eval_data math", "eval_data chat"]
    given.eval_data = [paths[0], paths[0]]
    with pytest.raises(ValueError, match="eval_by_source needs sources of different names"):
        load_sources(given, args)
    given.eval_data = None
    assert together(load_sources(given, args)[1], True) is None
