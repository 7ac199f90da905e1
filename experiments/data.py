"""The text of an experiment as rows of token ids: generated stories, or a text of the user's."""

import random
from pathlib import Path

import torch
from hf_moe.training.data.rows import load_rows
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_moe.demo import DEMO_MODEL
from hf_moe.demo.text import story

from .experiment import Budget


def tokenizer() -> PreTrainedTokenizerBase:
    """The demo model's: 512 words and parts of words, with every byte among them."""
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def text_of(data: str | None, characters: int) -> str:
    """About so many characters: of `data`, a file, a folder or a data set with a column text, else generated.

    Raises ValueError where there are fewer.
    """
    if data is None:
        rng, parts = random.Random(0), []
        while sum(map(len, parts)) < characters:
            parts.append("\n".join(story(rng)))
        return "\n".join(parts)
    if Path(data).suffix == ".txt" and Path(data).is_file():
        with Path(data).open(encoding="utf-8") as file:
            text = file.read(characters)
    else:
        text = ""
        for row in load_rows([data], split="train", what="--data")["text"]:
            text += row + "\n"
            if len(text) >= characters:
                break
    if len(text) < characters:
        raise ValueError(f"--data {data} has {len(text):,} characters, and this budget reads {characters:,}.")
    return text


def rows_of(data: str | None, budget: Budget) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows for training [N, S] and held-out ones [M, S], which come behind them in the text."""
    tokens = budget.tokens + budget.held_out * budget.length
    made = tokenizer()
    # The text is read in parts: of each the tokenizer tells how many tokens it has.
    characters = 6 * tokens if data is None else 4 * tokens
    ids = torch.tensor(made(text_of(data, characters), verbose=False).input_ids)
    if len(ids) < tokens:
        raise ValueError(f"The text has {len(ids):,} tokens, and this budget reads {tokens:,}.")
    rows = ids[:tokens].view(-1, budget.length)
    return rows[: -budget.held_out], rows[-budget.held_out :]
