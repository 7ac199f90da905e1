"""Texts that a model reads to be measured: from files, cut into windows of tokens."""

import reprlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ...reading import positions
from .checkpoint import read_text

MAX_TOKENS = 4096  # of a calibration text, unless more are asked for
WINDOW = 256  # tokens that are read together
CHARACTERS = 32  # of a token at most, on average
# Suffixes of row files, and what `datasets` calls them. Any other file is plain text.
ROW_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


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


def read_texts(path: Path, tokenizer: PreTrainedTokenizerBase, tokens: int = MAX_TOKENS) -> list[str]:
    """The texts of a file, enough for so many tokens: of rows (.jsonl, .json, .csv or .parquet) the column "text", or
    the conversations in "messages" by the tokenizer's chat template; else the whole file as one."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no calibration text {path}.")
    if path.suffix not in ROW_FILES:
        return [read_text(path, tokens * CHARACTERS)]
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    try:
        rows = load_dataset(ROW_FILES[path.suffix], data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError, StopIteration) as error:
        reason = str(error.__cause__ or error).splitlines() or ["it has no rows"]  # StopIteration says nothing
        raise ValueError(f"{path} cannot be read as rows: {reason[0]}") from error
    if "text" not in rows.column_names and "messages" in rows.column_names:
        if tokenizer.chat_template is None:
            raise ValueError(f"{path} has conversations, but the tokenizer has no chat template to read them by.")
        return [tokenizer.apply_chat_template(row, tokenize=False) for row in rows[:tokens]["messages"]]
    if "text" not in rows.column_names:
        raise ValueError(f"{path} has the columns {', '.join(rows.column_names)}; the calibration text is in text.")
    texts = rows[:tokens]["text"]
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{path}: row {index} of the column text is {reprlib.repr(text)}, which is no text.")
    return texts
