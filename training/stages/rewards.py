"""Rewards by rule: plain functions of completions and of the row's other columns, by name.

Each takes lists, one entry a completion, and returns one number each, or None where a row cannot be judged. Answers
are those of GSM8K (https://arxiv.org/abs/2110.14168): the text ends in `#### 42`.
"""

from collections.abc import Callable
from decimal import Decimal

from hf_moe.answers import MARK, last_number, marked_number, whole_number

Completion = str | list[dict[str, str]]


def true_answer(answer: str) -> Decimal | None:
    """A row's answer: the number after its `####`, or all of it where it has none."""
    number = whole_number(answer.strip())
    return marked_number(answer) if number is None else number


def text_of(completion: Completion) -> str:
    """A completion's text, which is in one message where the prompt is a conversation."""
    return completion if isinstance(completion, str) else completion[0]["content"]


def compare(found: Callable[[str], Decimal | None], completions: list[Completion], answers: list[str]) -> list:
    truths = map(true_answer, answers)
    pairs = zip(completions, truths, strict=True)
    return [None if truth is None else float(found(text_of(completion)) == truth) for completion, truth in pairs]


def gsm8k_answer(completions: list[Completion], answer: list[str], **columns) -> list[float | None]:
    """1 where the number after `####` is the row's answer."""
    return compare(marked_number, completions, answer)


def gsm8k_last_number(completions: list[Completion], answer: list[str], **columns) -> list[float | None]:
    """1 where the last number in the text is the row's answer, whatever stands around it."""
    return compare(last_number, completions, answer)


def gsm8k_format(completions: list[Completion], **columns) -> list[float]:
    """1 where the text ends in one line of `####` and a number, and has no other mark."""

    def ends_right(text: str) -> bool:
        before, mark, after = text.rstrip().rpartition(MARK)
        one = bool(mark) and MARK not in before and (before == "" or before.endswith("\n"))
        return one and whole_number(after.strip()) is not None

    return [float(ends_right(text_of(completion))) for completion in completions]


def digit_share(completions: list[Completion], **columns) -> list[float]:
    """The share of digits among the characters: something that a tiny model can learn, to try the whole path."""
    texts = [text_of(completion) for completion in completions]
    return [sum(x.isdigit() for x in text) / max(len(text), 1) for text in texts]


REWARDS: dict[str, Callable[..., list[float | None]]] = {
    "gsm8k_answer": gsm8k_answer,
    "gsm8k_last_number": gsm8k_last_number,
    "gsm8k_format": gsm8k_format,
    "digit_share": digit_share,
}
NEED_ANSWER = ("gsm8k_answer", "gsm8k_last_number")


def find_rewards(names: list[str], weights: list[float] | None) -> list[Callable]:
    """The functions of these names. Raises ValueError for an unknown name, or weights of another number."""
    unknown = [name for name in names if name not in REWARDS]
    if unknown or not names:
        raise ValueError(f"reward_funcs is {names}; it can hold {', '.join(REWARDS)}.")
    if weights is not None and len(weights) != len(names):
        raise ValueError(f"reward_weights has {len(weights)} numbers for {len(names)} reward_funcs.")
    return [REWARDS[name] for name in names]
