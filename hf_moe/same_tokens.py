"""Whether two tokenizers mean the same by an id: models that read each other's ids, or become one, have to."""

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

NAMED = ("bos_token", "eos_token")  # what begins and ends a text; nothing is learnt from padding
PROBE = "Mia's 3 cats, naïve as ever:  didn't they\n\tcount 1,024 stars? Ünïcödé 你好 <x>{}</x> x_y == 0.5\n"
CHAT = [
    {"role": "user", "content": "Hello, who are you?"},
    {"role": "assistant", "content": "A test."},
    {"role": "user", "content": "Thank you."},
]


def check_same_tokens(
    first: PreTrainedTokenizerBase,
    second: PreTrainedTokenizerBase,
    names: tuple[str, str],
    rows: int,
    why: str,
    roles: bool = True,
) -> None:
    """Raises a ValueError that names the first id below `rows` that is another token, or what else differs.

    names: of both models, for the message, which `why` ends. roles: compare what begins and ends a text, and the text
    that chat templates make, where both have one, too.
    """
    if said := difference(first, second, names, rows) or (roles and role_difference(first, second, names)):
        raise ValueError(f"{said}: {why}")


def difference(
    first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, names: tuple[str, str], rows: int
) -> str | None:
    """The first id that means another token, or the first token of a text that is read otherwise, in words."""
    ours, theirs = ({number: text for text, number in x.get_vocab().items() if number < rows} for x in (first, second))
    differing = [number for number in sorted(ours.keys() | theirs.keys()) if ours.get(number) != theirs.get(number)]
    if differing:
        number = differing[0]
        more = f" ({len(differing) - 1} more differ)" if differing[1:] else ""
        return f"token {number} is {ours.get(number)!r} in {names[0]}, {theirs.get(number)!r} in {names[1]}{more}"
    read = [x(PROBE, add_special_tokens=False).input_ids for x in (first, second)]
    if read[0] != read[1]:
        place = next((i for i, pair in enumerate(zip(*read, strict=False)) if pair[0] != pair[1]), min(map(len, read)))
        texts = [x.convert_ids_to_tokens(ids[place : place + 1]) for x, ids in zip((first, second), read, strict=True)]
        return (
            f"the tokenizers split a text in other ways: its token {place} is {texts[0]} in {names[0]}, {texts[1]} in "
            f"{names[1]}"
        )
    return None


def role_difference(
    first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, names: tuple[str, str]
) -> str | None:
    """What begins or ends a text in one of them alone, or how their chat templates part, in words."""
    for name in NAMED:
        ours, theirs = getattr(first, name), getattr(second, name)
        if ours != theirs:
            ids = [getattr(x, f"{name}_id") for x in (first, second)]
            return f"{name} is {ours!r} ({ids[0]}) in {names[0]}, {theirs!r} ({ids[1]}) in {names[1]}"
    if first.chat_template is None or second.chat_template is None:
        return None
    ours, theirs = rendered(first), rendered(second)
    if ours == theirs:
        return None
    place = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    place = min(len(ours), len(theirs)) if place is None else place
    begin = max(0, place - 10)
    return (
        f"the chat template writes {ours[begin : place + 20]!r} in {names[0]}, {theirs[begin : place + 20]!r} in "
        f"{names[1]}"
    )


def rendered(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a chat template makes of a short chat, or what it says against it: marks of training leave no trace."""
    try:
        said: Any = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError) as error:
        return str(error)
    return said
