"""Self-consistency (https://arxiv.org/abs/2203.11171): of several sampled texts, the answer that most of them give."""

import re
from collections import Counter
from collections.abc import Sequence

from ..answers import last_number, whole_number

# How texts announce their answer; the first kind found counts, and of it the last.
ANNOUNCED = (
    re.compile(r"\\boxed\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"),
    re.compile(r"####\s*(.+)"),
    re.compile(r"answer is:?\s*(.+?)(?:\.\s|\.?$)", flags=re.IGNORECASE | re.MULTILINE),
)


def extract_answer(text: str) -> str | None:
    r"""What a text answers: in \boxed{...}, after "####" or "answer is"; else its last number; else all of it.

    Numbers are written one way: "$1,200.0" is "1200". None for an empty text.
    """
    announced = next((answers for pattern in ANNOUNCED if (answers := pattern.findall(text))), None)
    answer = " ".join((announced[-1] if announced else text).split())
    number = whole_number(answer.removesuffix(".")) if announced else last_number(text)
    if number is None:
        return answer or None
    return f"{number.normalize():f}"


def majority(answers: Sequence[str | None]) -> tuple[str | None, int]:
    """The answer given most often, and how often; of equals the first. Those that are None don't vote."""
    votes = Counter(answer for answer in answers if answer is not None)
    return votes.most_common(1)[0] if votes else (None, 0)
