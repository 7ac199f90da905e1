"""Conversations as chat templates read them, whoever wrote them, and chat templates as any Jinja engine reads them."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# ShareGPT's names, and its descendants' -> those of chat templates, which are ROLES.
ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "tool_response": "tool",
}
CALLS = ("function_call", "tool_call")  # roles whose content is the JSON of calls, which an assistant makes
ROLES = ("system", "developer", "user", "assistant", "tool")
TEXTS = (None, "text", "input_text", "output_text")  # types of the parts of a content that are text
SAID = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")  # what may stand for a content
SPARED = ("weight", "train", "training", "loss")  # keys that are 0 or false in an answer that is not to be learnt
# {% generation %} marks what the assistant wrote, for a loss on that alone. No engine but Transformers knows the tag,
# and a comment does to the text around it what a tag does.
MARK = re.compile(r"\{%([-+]?)\s*((?:end)?generation)\s*([-+]?)%\}")
MARK_OR_COMMENT = re.compile(r"(?P<comment>\{#.*?#\})|(?P<tag>\{%[-+]?\s*(?:end)?generation\s*[-+]?%\})", re.DOTALL)
COMMENT = re.compile(r"\{#([-+]?)\s*((?:end)?generation)\s*([-+]?)#\}")

# Files of a model's folder that can hold a template.
TEMPLATE_FILES = (
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
    "chat_template.json",
    "tokenizer_config.json",
)


def conversation(entries: Any) -> list[dict[str, Any]]:
    """Messages with a role and a content: ShareGPT's from and value, its roles and lists of text parts rewritten.

    Raises ValueError with a reason, in one line, for what is no message, says nothing, or is no text.
    """
    if not isinstance(entries, list):
        raise ValueError(f"must be a list of messages, but is {type(entries).__name__}")
    return [message(entry) for entry in entries]


def message(entry: Any) -> dict[str, Any]:
    who, what = "role", "content"
    if isinstance(entry, dict):
        entry = {name: value for name, value in entry.items() if value is not None or name == "content"}
        if "role" not in entry and "from" in entry:
            who, what = "from", "value"
    if not isinstance(entry, dict) or who not in entry:
        raise ValueError(f"each entry needs role and content; found {entry!r:.200}")
    if isinstance(entry[who], str) and entry[who].lower() in CALLS:
        return {"role": "assistant", "content": "", "tool_calls": calls(entry.get(what), entry[who])}
    role, content = entry[who], text(entry.get(what))
    if not isinstance(role, str) or not isinstance(content, str | None):
        raise ValueError(f"{who} and {what} must be text; found {entry!r:.200}")
    if content is None and not any(entry.get(name) for name in SAID):
        raise ValueError(f"each entry needs {who} and {what}; found {entry!r:.200}")
    rest = {name: value for name, value in entry.items() if name not in (who, what)}
    known = ALIASES.get(role.lower(), role.lower())
    message = {"role": known if known in ROLES else role}
    return message | ({"content": content} if what in entry else {}) | rest


def calls(content: Any, role: str) -> list[dict[str, Any]]:
    """The calls in a content, JSON or what it stands for, as OpenAI's `tool_calls`."""
    try:
        found = json.loads(content) if isinstance(content, str) else content
    except json.JSONDecodeError as error:
        raise ValueError(f"a {role} is not JSON ({error}); found {content!r:.200}") from error
    found = found if isinstance(found, list) else [found]
    for call in found or [None]:
        if not isinstance(call, dict) or not {"name", "arguments"} <= call.keys() <= {"name", "arguments", "id"}:
            raise ValueError(f"a {role} needs name and arguments, or a list of such; found {content!r:.200}")
    return [
        {"type": "function", "function": {"name": call.pop("name"), "arguments": call.pop("arguments")}} | call
        for call in map(dict, found)
    ]


def text(content: Any) -> Any:
    """A content whose parts are text as one text, as processors join them; another as it is."""
    if not isinstance(content, list):
        return content
    parts = []
    for part in content:
        part = {"text": part} if isinstance(part, str) else part
        if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type") not in TEXTS:
            kind = part.get("type") if isinstance(part, dict) else None
            raise ValueError(
                f"a content has a part of type {kind}, but models here read text alone: leave out such rows"
                if kind not in TEXTS
                else f"a content has a part without text: {part!r:.200}"
            )
        parts.append(part["text"])
    return "".join(parts)


def unknown_role(messages: list[dict[str, Any]], template: str) -> str | None:
    """The first role that neither is one of ROLES nor stands in the template by its name."""
    for message in messages:
        role = message["role"]
        if role not in ROLES and not re.search(rf"""(["']){re.escape(role)}\1""", template):
            return role
    return None


def unread(messages: list[dict[str, Any]], template: str) -> str | None:
    """What stands in a message beside its content and would be left out: the template does not have its name."""
    for message in messages:
        names = ["tool_calls"] if message.get("tool_calls") else []
        if message["role"] == "assistant":
            names += [name for name in SPARED if isinstance(message.get(name), int | float) and not message[name]]
        for name in names:
            if not re.search(rf"\b{name}\b", template):
                return name if name == "tool_calls" else f"an answer with {name} {message[name]}"
    return None


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], where: str, **given: Any) -> str:
    """The chat template's text. Raises ValueError of one line, which begins with `where`, for whatever it raises."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **given)
    except Exception as error:  # a template is a program, whose mistakes are as many as Python's
        raise refusal(error, messages, where) from error


def refusal(error: Exception, messages: list[dict[str, Any]] | None = None, where: str | None = None) -> ValueError:
    """In one line, that a chat template could not take `messages`, and why; where it is known, which and where."""
    kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
    reason = f"{kind}{' '.join(str(error).split())}"
    begin = "The" if where is None else f"{where}: the"
    end = "." if messages is None else f": {messages!r:.200}"
    return ValueError(
        f"{begin} chat template refuses a conversation ({reason}), so mend it or give another template{end}"
    )


@contextmanager
def plain_template_errors() -> Iterator[None]:
    """What a chat template says of a conversation that it refuses, as `refusal`, where something else renders it."""
    try:
        yield
    except TemplateError as error:
        raise refusal(error) from error


def plain(template: str) -> str:
    """A template, or a JSON file with one, whose marks of the assistant's words are comments, which all engines skip.

    The text that it writes is the same.
    """

    def unmark(found: re.Match) -> str:
        if found["tag"]:
            return MARK.sub(r"{#\1 \2 \3#}", found["tag"])
        return MARK.sub(r"\2", found["comment"])  # in which another comment would end it

    return MARK_OR_COMMENT.sub(unmark, template)


def plain_templates(folder: Path) -> dict[str, str]:
    """Names of the files in a model's folder whose templates have marks -> what they hold without."""
    texts = {path: path.read_text(encoding="utf-8") for name in TEMPLATE_FILES for path in folder.glob(name)}
    return {str(path.relative_to(folder)): plain(text) for path, text in texts.items() if MARK.search(text)}


def write_plain_templates(folder: Path) -> None:
    for name, text in plain_templates(folder).items():
        aside = folder / f"{name}.partial"
        aside.write_text(text, encoding="utf-8")
        aside.replace(folder / name)


def marked(template: str) -> str:
    """The inverse of `plain`."""
    return COMMENT.sub(r"{%\1 \2 \3%}", template)
