"""Numbers in the answers of texts, read exactly.

Those of GSM8K (https://arxiv.org/abs/2110.14168) end in `#### 42`.
"""

import re
from decimal import Decimal

MARK = "####"
# A minus that stands after a word, a digit or a bracket, or away from its number, is an operator: 5-3 holds 5 and 3.
# Commas group by three, or the number is none.
SIGN = r"((?<![\w)\]])[-−])?\$?"
DIGITS = r"((?<!\d)\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|(?<!\d)\.\d+)(?![,.]?\d)"
NUMBER = re.compile(SIGN + DIGITS)


def to_number(match: re.Match) -> Decimal:
    """Exactly the number that was written: -$1,234.50 is -1234.5."""
    number = Decimal(match[2].replace(",", ""))
    return -number if match[1] else number


def marked_number(text: str) -> Decimal | None:
    """The number right after the last `####`."""
    _, mark, after = text.rpartition(MARK)
    match = NUMBER.match(after.lstrip()) if mark else None
    return to_number(match) if match else None


def whole_number(text: str) -> Decimal | None:
    """The number that is all of the text."""
    match = NUMBER.fullmatch(text)
    return to_number(match) if match else None


def last_number(text: str) -> Decimal | None:
    """The last number in the text."""
    matches = list(NUMBER.finditer(text))
    return to_number(matches[-1]) if matches else None
