"""Conversations to tokens in batches: the chat template's text, its token ids, and which of them the assistant wrote.

The result is Transformers' `apply_chat_template(..., return_assistant_tokens_mask=True)`, in a tenth of its time: one
rendering marks the assistant's words, and tokie tokenises (https://github.com/chonkie-inc/tokie). A byte-level token
is a known number of bytes, so its place in the text needs no search. Rows where that does not hold are left to
Transformers, and all are if tokie disagrees with it on a sample.
"""

import json
import secrets
import tempfile
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import jinja2
import numpy as np
import pyarrow as pa
import tokie
from datasets import Dataset
from jinja2.ext import Extension
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from hf_moe.chat import refusal

from ..host import compile_chat_template

IGNORED = -100  # of labels that do not count
MARK = f"\0{secrets.token_hex(16)}"  # no conversation holds it
SAMPLE = 256  # rows on which tokie and Transformers are compared
EVERY_BYTE = "".join(map(chr, range(256))) + "日本語 😀"  # some vocabularies lack some


class Generation(Extension):
    """`{% generation %}` as MARK before and after what it encloses. Transformers' own extension is slower."""

    tags = {"generation"}
    priority = Extension.priority + 1  # wins over Transformers' own

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [jinja2.nodes.Output([jinja2.nodes.TemplateData(MARK)], lineno=line) for _ in range(2)]
        return [marks[0], *body, marks[1]]


class Encoder:
    """Tables with a column of conversations to tables with `input_ids` and `labels`, both lists of int32.

    Args:
        template: a chat template. `assistant_only`: labels are IGNORED outside `{% generation %}`; else never.
        fast: tokenise with tokie, where the bytes add up. name: what errors call the rows.
    Raises ValueError for a conversation that the template refuses, with the number of its row.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        assistant_only: bool,
        fast: bool = True,
        name: str = "train_data",
    ):
        self.tokenizer, self.template, self.assistant_only = tokenizer, template, assistant_only
        self.fast, self.name = fast, name

    def __getstate__(self) -> dict:
        # Another process builds its own of the rest.
        return {name: self.__dict__[name] for name in ("tokenizer", "template", "assistant_only", "fast", "name")}

    def __call__(self, table: pa.Table, rows: Sequence[int] | None = None) -> pa.Table:
        """`rows`: the numbers of the table's rows, where it is a part of a data set."""
        pieces = self.render(table, range(len(table)) if rows is None else rows)
        encode = self.with_tokie if self.fast else self.with_transformers
        ids, counts, counted = encode(pieces)
        labels = np.where(counted, ids, IGNORED).astype(np.int32) if self.assistant_only else ids
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
        lists = {"input_ids": ids, "labels": labels}
        return pa.table({name: pa.ListArray.from_arrays(offsets, pa.array(flat)) for name, flat in lists.items()})

    # ---- text ----

    @cached_property
    def compiled(self) -> jinja2.Template:
        environment = compile_chat_template(self.template).environment.overlay(extensions=[Generation])
        template = environment.from_string(self.template)
        template.globals = dict(template.globals)  # which every rendering copies, and this copies faster
        return template

    @cached_property
    def given(self) -> dict:
        """What a template sees beside the messages, as Transformers gives it."""
        return {"tools": None, "documents": None, "add_generation_prompt": False, **self.tokenizer.special_tokens_map}

    def render(self, table: pa.Table, rows: Sequence[int]) -> list[list[str]]:
        """The text of each row, cut where the assistant's words begin and end."""
        pieces = []
        for row, messages in zip(rows, conversations(table), strict=True):
            try:
                pieces.append(self.compiled.render(messages=messages, **self.given).split(MARK))
            except Exception as error:  # a template is a program, whose mistakes are as many as Python's
                raise refusal(error, messages, f"{self.name}: row {row}") from error
        return pieces

    # ---- token ids of all rows one after the other, how many each row has, and which of them the assistant wrote ----

    def with_transformers(self, pieces: list[list[str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        encodings = self.tokenizers.encode_batch(["".join(row) for row in pieces], add_special_tokens=False)
        counts = np.array([len(encoding.ids) for encoding in encodings])
        counted = np.zeros(counts.sum(), dtype=bool)
        for row, encoding, begin in zip(pieces, encodings, np.cumsum(counts) - counts, strict=True):
            for start, stop in spans(map(len, row)):
                places = [encoding.char_to_token(place) for place in range(start, stop)]
                places = [place for place in places if place is not None]  # a normalizer may leave nothing of a space
                if places:
                    counted[begin + places[0] : begin + places[-1] + 1] = True
        return np.fromiter((x for row in encodings for x in row.ids), np.int32, counts.sum()), counts, counted

    def with_tokie(self, pieces: list[list[str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        ids, counts, ends, (starts, stops), odd = self.with_bytes(pieces)
        if len(pieces) == 1 and odd[0]:
            return self.with_transformers(pieces)
        if odd.any():  # until the odd ones are alone
            middle = len(pieces) // 2
            halves = self.with_tokie(pieces[:middle]), self.with_tokie(pieces[middle:])
            return tuple(map(np.concatenate, zip(*halves, strict=True)))
        first, last = (np.searchsorted(ends, bytes_, side="right") for bytes_ in (starts, stops - 1))
        opened, closed = (np.bincount(tokens, minlength=len(ids) + 1) for tokens in (first, last + 1))
        return ids.astype(np.int32), counts, np.cumsum(opened - closed)[:-1] > 0

    def with_bytes(self, pieces: list[list[str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Token ids and their counts by tokie; where each token ends and the assistant's spans, in bytes of all rows.

        Also which rows are odd: their tokens' bytes don't add up, for a character was normalised or is unknown.
        """
        ids, counts = self.tokie.encode_batch_flat(["".join(row) for row in pieces], add_special_tokens=False)
        counts = counts.astype(np.int64)
        ends = np.cumsum(self.widths[ids])
        widths = np.diff(np.concatenate([[0], ends])[np.cumsum(counts)], prepend=0)
        sizes = np.array([len(x) if x.isascii() else len(x.encode()) for row in pieces for x in row])
        parts = np.array([len(row) for row in pieces])
        begins = np.cumsum(parts) - parts
        place = np.arange(len(sizes)) - np.repeat(begins, parts)
        stops = np.cumsum(sizes)
        marked = np.stack([stops - sizes, stops])[:, (place % 2 == 1) & (sizes > 0)]
        return ids, counts, ends, marked, widths != np.add.reduceat(sizes, begins)

    @cached_property
    def description(self) -> str:
        """The tokenizer as the text of its file, which neither truncates nor pads."""
        described = json.loads(self.tokenizer.backend_tokenizer.to_str())
        return json.dumps(described | {"truncation": None, "padding": None}, sort_keys=True)

    @cached_property
    def tokenizers(self) -> Tokenizer:
        return Tokenizer.from_str(self.description)

    @cached_property
    def tokie(self) -> tokie.Tokenizer:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokenizer.json"
            path.write_text(self.description, encoding="utf-8")
            return tokie.Tokenizer.from_json(str(path))

    @cached_property
    def widths(self) -> np.ndarray:
        """How many bytes each token is. Byte-level vocabularies write each byte as one character."""
        added = self.tokenizer.added_tokens_decoder
        widths = np.zeros(len(self.tokenizer), dtype=np.int64)
        for token, number in self.tokenizer.get_vocab().items():
            widths[number] = len(token.encode()) if number in added else len(token)
        return widths

    def agrees_with_transformers(self, rows: Dataset) -> bool:
        """Whether tokie, on SAMPLE of the rows, evenly spaced, gives what Transformers gives, and mostly by itself."""
        chosen = np.unique(np.linspace(0, len(rows) - 1, SAMPLE).astype(int))
        pieces = self.render(rows.select(chosen).with_format("arrow")[:], chosen)
        try:
            odd = self.with_bytes([*pieces, [EVERY_BYTE]])[-1][:-1]
        except BaseException as error:  # tokie's own, or that of a panic, which is no Exception
            if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
                raise
            return False
        pairs = zip(self.with_tokie(pieces), self.with_transformers(pieces), strict=True)
        return odd.mean() < 0.5 and all(np.array_equal(ours, theirs) for ours, theirs in pairs)


def conversations(table: pa.Table) -> list[list[dict[str, str]]]:
    """The messages of each row."""
    rows = table["messages"].combine_chunks()
    role, content = (rows.flatten().field(key).to_pylist() for key in ("role", "content"))
    messages = [{"role": who, "content": what} for who, what in zip(role, content, strict=True)]
    stops = np.cumsum(rows.value_lengths().to_numpy(zero_copy_only=False))
    return [messages[start:stop] for start, stop in zip([0, *stops[:-1]], stops, strict=True)]


def spans(sizes) -> list[tuple[int, int]]:
    """Where the odd ones of pieces of these sizes begin and end, without empty ones."""
    ends = list(accumulate(sizes))
    return [(start, stop) for start, stop in zip(ends[0::2], ends[1::2], strict=False) if start < stop]
