"""Rewards by rule: which number a text answers with, exactly."""

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hf_moe.training.stages.rewards import REWARDS, find_rewards, true_answer

from hf_moe.answers import last_number, marked_number

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "sft" / "train.jsonl"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 6 x 7 = 42\n#### 42", "42"),
        ("#### 1,234,567", "1234567"),
        ("#### $1,234.50", "1234.5"),
        ("#### -$5", "-5"),
        ("####−7", "-7"),
        ("#### .5", "0.5"),
        ("#### 18.", "18"),
        ("#### 18.00 apples", "18"),
        ("#### 3 or rather #### 4", "4"),
        ("#### 1,23", None),
        ("#### 1234,567", None),
        ("#### about 7", None),
        ("####", None),
        ("42", None),
    ],
)
def test_number_after_the_mark(text, number):
    assert marked_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It costs $3.50.", "3.5"),
        ("5-3", "3"),
        ("f(4)-2", "2"),
        ("from -3 to -12", "-12"),
        ("1, 2, 3", "3"),
        ("of 3,400 he keeps 1,000.", "1000"),
        ("0.1 + 0.2 = 0.3", "0.3"),
        ("nothing", None),
        ("", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_answers_are_compared_as_numbers_and_rows_without_one_are_not_judged():
    completions = ["#### 1,000.0", [{"role": "assistant", "content": "It is 1000"}], "#### 1001", "#### 7"]
    answers = ["#### 1000", "1,000", "1000", "no number"]
    assert REWARDS["gsm8k_answer"](completions, answer=answers) == [1.0, 0.0, 0.0, None]
    assert REWARDS["gsm8k_last_number"](completions, answer=answers) == [1.0, 1.0, 0.0, None]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Work.\n#### 42", True),
        ("#### -3.5\n", True),
        ("Work. #### 42", False),
        ("Work.\n#### 42 apples", False),
        ("#### 1\n#### 2", False),
        ("42", False),
    ],
)
def test_format(text, right):
    assert REWARDS["gsm8k_format"]([text], answer=["42"]) == [float(right)]


def test_share_of_digits():
    assert REWARDS["digit_share"](["12ab", "", "7"]) == [0.5, 0.0, 1.0]


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["gsm8k"], None, r"reward_funcs is \['gsm8k'\]; it can hold gsm8k_answer, gsm8k_last_number"),
        ([], None, r"reward_funcs is \[\]"),
        (["gsm8k_format"], [1.0, 0.5], "reward_weights has 2 numbers for 1 reward_funcs"),
    ],
)
def test_wrong_names_and_weights(names, weights, message):
    with pytest.raises(ValueError, match=message):
        find_rewards(names, weights)


@pytest.mark.skipif(not GSM8K.is_file(), reason="needs GSM8K rows beside the repository")
def test_every_solution_of_gsm8k_is_right():
    with GSM8K.open(encoding="utf-8") as file:
        rows = list(map(json.loads, file))
    solutions = [row["messages"][-1]["content"] for row in rows if row["source"] == "gsm8k"]
    assert len(solutions) == 3000 and None not in map(true_answer, solutions)
    for name in ("gsm8k_answer", "gsm8k_last_number", "gsm8k_format"):
        assert set(REWARDS[name](solutions, answer=solutions)) == {1.0}
