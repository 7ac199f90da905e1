"""The chat template of a run: the one that the recipe names or the tokenizer's, and whether the rows go through it."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments
from trl import SFTConfig, get_training_chat_template

from hf_moe.chat import ROLES, marked, render, unknown_role, unread

from ..host_trl import has_generation_markers
from .rows import PLAIN, is_conversational

TEMPLATES = Path(__file__).parent / "templates"
SUFFIXES = (".jinja", ".j2")  # of what is a file or a mistake; any other name can be a tokenizer's
Messages = list[dict[str, Any]]
ANSWERS = ("completion", "chosen", "rejected")  # columns of what follows a prompt


def shipped_templates() -> dict[str, str]:
    """The chat templates that come with hf_moe: name to file."""
    return {path.stem: str(path) for path in sorted(TEMPLATES.glob("*.jinja"))}


def find_template(name: str | None) -> str | None:
    """The file of a shipped template by its name; a file, a folder or a Hub tokenizer's name as it is, for TRL."""
    if name is None or Path(name).exists():
        return name
    path = shipped_templates().get(name, name)
    if path == name and ("/" not in name or name.endswith(SUFFIXES)):
        raise FileNotFoundError(
            f"chat_template_path: there is no file {name}; the templates that come along are "
            f"{', '.join(shipped_templates())}."
        )
    return path


def use_template(tokenizer: PreTrainedTokenizerBase, args: TrainingArguments) -> None:
    """Give the tokenizer the template of the file that the arguments name, which then name none.

    With its marks in either case, also where they are comments; see hf_moe.chat.
    """
    if args.chat_template_path is not None and Path(args.chat_template_path).is_file():
        tokenizer.chat_template = Path(args.chat_template_path).read_text(encoding="utf-8")
        args.chat_template_path = None
    restore_marks(tokenizer)


def restore_marks(tokenizer: PreTrainedTokenizerBase) -> None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: marked(text) for name, text in template.items()}
    elif template is not None:
        tokenizer.chat_template = marked(template)


def training_template(tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> str:
    """The template's text; TRL's marked one for a family that it knows.

    Raises ValueError where the loss is on the assistant's words alone and nothing marks them.
    """
    template = tokenizer.get_chat_template()
    if not args.assistant_only_loss or has_generation_markers(template):
        return template
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise ValueError(
            "assistant_only_loss is true, but the chat template marks no word of the assistant: enclose its words in "
            "{% generation %} and {% endgeneration %} and give --chat_template_path FILE.jinja, or say "
            "--assistant_only_loss false."
        ) from error


def conversations(row: dict[str, Any]) -> list[tuple[Messages, bool]]:
    """What TRL takes of a row through the template, each with whether an answer of the assistant is to follow."""
    if "messages" in row:
        return [(row["messages"], False)]
    answers = [row[name] for name in ANSWERS if name in row]
    return [(row["prompt"], True), *((row["prompt"] + answer, False) for answer in answers)]


def check_template(
    tokenizer: PreTrainedTokenizerBase,
    groups: dict[str, Dataset],
    num_proc: int | None = None,
    said: Callable[[dict], Iterable[tuple[Messages, bool]]] = conversations,
    roles_alone: bool = False,
) -> None:
    """Raises ValueError where rows of `groups`, by their names, hold conversations that the template does not take.

    With the number of the first such row. `said`: what of a row goes through the template, and whether it is to end
    with what begins an answer. `roles_alone`: of rows of plain messages, where tokenising them tells the rest.
    """
    for name, rows in groups.items():
        if not is_conversational(rows):
            continue
        if tokenizer.chat_template is None:
            raise ValueError(
                "The rows are conversations and the tokenizer has no chat template: give --chat_template_path "
                f"FILE.jinja, or one of {', '.join(shipped_templates())}."
            )
        if roles_alone and rows.features == {"messages": PLAIN}:
            check_roles(rows, name, tokenizer.get_chat_template())
        else:
            checking = Checking(tokenizer, name, said)
            rows.map(checking, with_indices=True, num_proc=num_proc, desc=f"Checking {name}")


class Checking:
    """A row, and its number, through the chat template; see `check_template`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, said: Callable):
        self.tokenizer, self.name, self.said = tokenizer, name, said
        self.template = tokenizer.get_chat_template()

    def __call__(self, row: dict[str, Any], number: int) -> None:
        where = f"{self.name}: row {number}"
        given = {"tools": row.get("tools")} | (row.get("chat_template_kwargs") or {})
        for messages, answered in self.said(row):
            check_role(messages, self.template, where)
            check_read(messages, self.template, where)
            render(self.tokenizer, messages, where, add_generation_prompt=answered, **given)


def check_roles(rows: Dataset, name: str, template: str) -> None:
    """As `check_template`, of the roles alone, for rows that are nothing but messages with a content."""
    messages = pc.list_flatten(rows.with_format("arrow")[:]["messages"])
    if set(pc.unique(pc.struct_field(messages, "role")).to_pylist()) <= set(ROLES):
        return
    for number, talk in enumerate(rows["messages"]):
        check_role(talk, template, f"{name}: row {number}")


def check_role(messages: Messages, template: str, where: str) -> None:
    if (role := unknown_role(messages, template)) is not None:
        raise ValueError(
            f"{where} has the role {role!r}, which is none of {', '.join(ROLES)} (or human, gpt), and which the chat "
            "template does not name: rewrite it, or give --chat_template_path FILE.jinja with it."
        )


def check_read(messages: Messages, template: str, where: str) -> None:
    if (what := unread(messages, template)) is not None:
        raise ValueError(
            f"{where} has {what}, which the chat template does not read: leave out such rows, or give "
            "--chat_template_path FILE.jinja that reads it."
        )
