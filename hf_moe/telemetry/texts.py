"""Texts to look at a model with: domains, read window by window and put together in batches."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ..texts import Rows, texts

SORTED = 64  # windows that are sorted by length before they are put together, for less padding


class Batch(NamedTuple):
    ids: torch.Tensor  # [B, S], padded on the right
    mask: torch.Tensor  # [B, S], 0 on padding


class Domain:
    """One source of text: `windows` gives its first `max_tokens` tokens, and can be asked again."""

    def __init__(
        self, name: str, source: str | Rows, tokenizer: PreTrainedTokenizerBase, window: int, max_tokens: int | None
    ):
        self.name, self.source = name, source
        self.said = source if isinstance(source, str) else f"{name} ({len(source)} texts)"
        self.tokenizer, self.window, self.max_tokens = tokenizer, window, max_tokens

    def windows(self) -> Iterator[list[int]]:
        """Token ids, at most `window` at a time; no window reaches over the end of a text."""
        left = self.max_tokens
        for text in texts(self.source, self.tokenizer):
            ids = self.tokenizer(text, verbose=False).input_ids if text.strip() else []
            ids = ids[:left]
            for start in range(0, len(ids), self.window):
                yield ids[start : start + self.window]
            if left is not None:
                left -= len(ids)
                if left <= 0:
                    return

    def batches(self, tokens: int) -> Iterator[Batch]:
        """The windows, together up to about `tokens` places a batch."""
        for windows in chunks(self.windows(), SORTED):
            yield from together(windows, tokens)

    def count(self, vocab_size: int) -> torch.Tensor:
        """How often each token id occurs, [V] int64. Reads everything, so that what is broken shows before the model
        runs.

        Raises ValueError for a text without tokens and for ids that the model does not know.
        """
        counts = torch.zeros(vocab_size, dtype=torch.long, device="cpu")
        for ids in self.windows():
            if max(ids) >= vocab_size:
                raise ValueError(f"The tokenizer gives token {max(ids)}, the model knows {vocab_size}.")
            counts += torch.bincount(torch.tensor(ids, device="cpu"), minlength=vocab_size)
        if not counts.any():
            raise ValueError(f"{self.said} holds no text: not one token to trace.")
        return counts


def together(windows: list[list[int]], tokens: int) -> Iterator[Batch]:
    """Windows of about the same length in batches of up to about `tokens` places."""
    rows = []
    for ids in sorted(windows, key=len):
        if rows and len(ids) * (len(rows) + 1) > tokens:
            yield padded(rows)
            rows = []
        rows.append(ids)
    yield padded(rows)


def padded(rows: list[list[int]]) -> Batch:
    """Rows of token ids as one batch; 0 stands on padding, where the mask is 0."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device="cpu")
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows], device="cpu")
    return Batch(ids, mask)


def chunks(items: Iterator, size: int) -> Iterator[list]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def named_sources(data: Sequence[str | Path] | Mapping[str, str | Path | Rows]) -> dict[str, str | Rows]:
    """Name of each domain -> its source: "NAME=SOURCE", or as much of the end of the path as tells them apart.

    A mapping has the names already.
    """
    if not data:
        raise ValueError("There is no text to trace: give --data FILE or a data set.")
    if isinstance(data, Mapping):
        return {str(name): str(source) if isinstance(source, Path) else source for name, source in data.items()}
    named = {}
    for entry in data:
        name, equals, source = str(entry).partition("=")
        if not (equals and name and source) or Path(entry).expanduser().exists():
            name, source = None, str(entry)
        if source in named:
            raise ValueError(f"{source} is given twice; each --data is a domain of its own.")
        named[source] = name
    paths = {source: Path(source).with_suffix("").parts for source, name in named.items() if name is None}
    for source, parts in paths.items():
        size = 1
        while size < len(parts) and any(
            other[-size:] == parts[-size:] for key, other in paths.items() if key != source
        ):
            size += 1
        named[source] = "/".join(parts[-size:])
    names = list(named.values())
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two domains are called {name}; name them with --data NAME=FILE.")
    return {name: source for source, name in named.items()}
