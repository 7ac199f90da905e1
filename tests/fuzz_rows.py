"""Random rows for training and tracing, from as people mean them to as no program would write them, in files."""

import gzip
import json
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet

# In the order of how sensible they are.
ROLES = ("user", "assistant", "system", "tool", "human", "gpt", "developer", "User", "unknown", "", None, 3, [], {})
TEXTS = (
    *(
        "Say hello.",
        "hello",
        "Once upon a time there was a cat.",
        "1 + 1 = 2",
        "#### 42",
        "<|user|>",
        "</s>",
        "{{ x }}",
    ),
    *("", " ", "\n", "\t\n ", "\0", "a\0b", "\ufeff", "\u200b\u200d\u2060", "\u202eright to left\u202c", "שלום עולם"),
    *(
        "👩\u200d👩\u200d👧\u200d👦",
        "🏳️\u200d🌈",
        "é" + "\u0301" * 40,
        "\ud800",
        "a\udfffb",
        "\uffff",
        "\U0010ffff",
        "日本語",
    ),
    *("\x1b[31m", "\x85\u2028\u2029", "{% endfor %}", "null", "[]", '{"a": null}', "-1e999", "NaN"),
)
PARTS = (
    *({"type": "text", "text": "Look."}, {"type": "input_text", "text": "Look."}, "Look.", {"text": "Look."}),
    *({"type": "image"}, {"type": "image_url", "image_url": {"url": "http://x"}}, {"type": "audio", "audio": None}),
    *({"type": "text"}, {"type": "text", "text": None}, {"type": None, "text": 3}, {}, None, 1, [], [["Look."]]),
)
VALUES = (None, 0, -1, 1.5, True, "text", "", [], {}, [None], {"a": None}, 2**63, -(2**70), 1e300, [[[]]])
TOOL = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALL = {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
LAYOUTS = {
    "sft": ("messages", "conversations", "prompt completion", "text"),
    "distil": ("messages", "conversations", "prompt completion", "text"),
    "pretrain": ("text", "messages"),
    "dpo": ("prompt chosen rejected", "chosen rejected"),
    "grpo": ("prompt", "prompt answer", "question answer", "messages", "conversations"),
    "trace": ("text", "messages", "conversations", "prompt completion"),
}
LONGEST = 200_000  # characters of a turn


class Rows:
    """Rows of which about a share `odd` of all values is none that anybody should write."""

    def __init__(self, random: Random, odd: float):
        self.random, self.odd = random, odd

    def is_odd(self) -> bool:
        return self.random.random() < self.odd

    def text(self) -> str:
        draw = self.random
        if self.is_odd() and draw.random() < 0.3:
            return draw.choice(("long ", "🐈", "a", "\n", "\u200b", "שלום")) * draw.randint(1, LONGEST // 6)
        return "".join(draw.choice(TEXTS if self.is_odd() else TEXTS[:5]) for _ in range(draw.randint(1, 4)))

    def value(self) -> Any:
        made = (lambda: self.random.choice(VALUES), self.text, lambda: [self.value()], lambda: {"a": self.value()})
        return self.random.choices(made, (4, 2, 1, 1))[0]()

    def content(self) -> Any:
        draw = self.random
        if draw.random() < 0.2:
            return [draw.choice(PARTS if self.is_odd() else PARTS[:4]) for _ in range(draw.randint(0, 3))]
        return self.value() if self.is_odd() else self.text()

    def message(self, role: str, sharegpt: bool) -> Any:
        draw = self.random
        if self.is_odd() and draw.random() < 0.2:
            return self.value()
        role = draw.choice(ROLES) if self.is_odd() else role
        names = ("from", "value") if sharegpt else ("role", "content")
        said = dict(zip(names, (role, self.content()), strict=True))
        if draw.random() < 0.1:
            said["tool_calls"] = self.value() if self.is_odd() else [CALL] * draw.randint(0, 2)
        for name in ("weight", "name", "reasoning_content", "tool_call_id"):
            if self.is_odd():
                said[name] = self.value()
        if self.is_odd():
            said.pop(draw.choice(sorted(said)))
        return said

    def messages(self, sharegpt: bool = False) -> Any:
        if self.is_odd() and self.random.random() < 0.3:
            return self.value()
        roles = ("human", "gpt") if sharegpt else ("user", "assistant")
        turns = [roles[turn % 2] for turn in range(2 * self.random.randint(1, 3))]
        if self.random.random() < 0.2:
            turns = ["system", *turns]
        if self.is_odd():
            turns = turns[: self.random.randint(0, len(turns))]
        return [self.message(role, sharegpt) for role in turns]

    def row(self, layout: str, talk: bool) -> dict:
        columns = layout.split()
        asked = [self.message("user", False)]
        said: dict[str, Any] = {}
        for name in columns:
            if name in ("messages", "conversations"):
                said[name] = self.messages(sharegpt=name == "conversations")
            elif talk and name in ("prompt", "completion", "chosen", "rejected"):
                answer = [] if name == "prompt" else [self.message("assistant", False)]
                said[name] = ([] if answer and "prompt" in columns else asked) + answer
            else:
                said[name] = self.text()
            if self.is_odd():
                said[name] = self.value()
        if self.random.random() < 0.15:
            said["tools"] = self.value() if self.is_odd() else [TOOL]
        for name in ("chat_template_kwargs", "images", "id", "score", "answer", "système"):
            if self.is_odd() and self.random.random() < 0.5:
                said[name] = self.value()
        if self.is_odd() and self.random.random() < 0.3:
            said.pop(self.random.choice(sorted(said)))
        return said

    def rows(self, stage: str, count: int) -> list[Any]:
        def layout() -> str:
            anything = sum(LAYOUTS.values(), ())
            return self.random.choice(anything if self.is_odd() else LAYOUTS[stage])

        one, talk, made = layout(), self.random.random() < 0.6, []
        for _ in range(count):
            if self.is_odd() and self.random.random() < 0.1:
                made.append(self.value())
            else:
                mixed = self.is_odd() and self.random.random() < 0.3
                made.append(self.row(layout() if mixed else one, not talk if mixed else talk))
        return made


def write(rows: list[Any], folder: Path, random: Random, odd: float) -> Path:
    """The rows as Parquet, where Arrow takes them, or as JSON in one of the ways that people write it."""
    if random.random() < 0.35:
        path = folder / "rows.parquet"
        try:
            pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
            return path
        except (pa.ArrowException, TypeError, ValueError, AttributeError, OverflowError):
            path.unlink(missing_ok=True)  # of several kinds in one column, or with half a surrogate pair
    escaped = random.random() < 0.5
    lines = [json.dumps(row, ensure_ascii=escaped) for row in rows]
    end = "\r\n" if random.random() < 0.1 else "\n"
    content = end.join(lines) + end
    if random.random() < 0.1:
        content = f"[{', '.join(lines)}]"
    content = content.encode("utf-8", "surrogatepass")
    if random.random() < odd * 0.3:
        content = content[: random.randint(0, len(content))]
    if random.random() < 0.05:
        content = b"\xef\xbb\xbf" + content
    name = "rows.json" if content[:1] == b"[" else "rows.jsonl"
    if random.random() < odd * 0.2:
        name = random.choice(("rows.csv", "rows.txt", "rows.json", "rows.parquet", "rows.arrow", "rows.xml", "rows"))
    elif random.random() < 0.1:
        name, content = f"{name}.gz", gzip.compress(content, 1)
    path = folder / name
    path.write_bytes(content)
    return path
