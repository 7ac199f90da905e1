"""Texts that a model reads to be measured, cut into windows of tokens."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ...reading import positions

MAX_TOKENS = 4096  # of a calibration text, unless more are asked for
WINDOW = 256  # tokens that are read together


def name_of(source: str | Path) -> str:
    """What a text is called where it is written down: a file's name without its folder, a data set's on the Hub."""
    return Path(source).name if Path(source).exists() else str(source)


def encoded(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> list[torch.Tensor]:
    """The token ids [T] of each text. Raises ValueError where it has none, or one that the model does not know."""
    read = [tokenizer(text, verbose=False).input_ids for text in texts]
    found = [torch.tensor(ids, dtype=torch.long, device="cpu") for ids in read]
    for text, ids in zip(texts, found, strict=True):
        if not len(ids):
            raise ValueError(f"The prompt {text!r} has no tokens.")
        if ids.max() >= config.vocab_size:
            raise ValueError(f"The tokenizer gives token {ids.max()}, the model knows {config.vocab_size}.")
    return found


def cut(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, tokens: int = MAX_TOKENS
) -> list[torch.Tensor]:
    """The first tokens, so many, in windows that do not reach over the end of a text."""
    windows, left = [], tokens
    size = positions(config, WINDOW)
    for text in texts:
        for ids in encoded([text], tokenizer, config)[0][:left].split(size) if text.strip() else ():
            windows.append(ids)
            left -= len(ids)
        if not left:
            break
    if not windows:
        raise ValueError("The calibration text is empty.")
    return windows
