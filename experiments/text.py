"""The text of an experiment as rows of token ids, read once for all runs: generated stories, or the user's texts."""

import random
from array import array
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from hf_moe.demo import DEMO_MODEL
from hf_moe.demo.text import story
from hf_moe.texts import texts

from .experiment import Budget

LEARNT_FROM = 4_000_000  # characters that a vocabulary is learnt from
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # of a learnt vocabulary, and of the demo model's


class Text(NamedTuple):
    """Rows for training [N, S] and held-out ones [M, S], which come behind them in the text."""

    rows: torch.Tensor
    held_out: torch.Tensor
    tokenizer: PreTrainedTokenizerBase

    def save(self, folder: Path) -> None:
        save_file({"rows": self.rows, "held_out": self.held_out}, folder / "rows.safetensors")
        self.tokenizer.save_pretrained(folder)

    @classmethod
    def load(cls, folder: Path) -> "Text":
        rows = {name: x.long() for name, x in load_file(folder / "rows.safetensors").items()}
        return cls(**rows, tokenizer=AutoTokenizer.from_pretrained(folder))


def read_text(data: str | None, budget: Budget) -> Text:
    """The rows that a budget reads. Raises ValueError where the text has fewer."""
    documents = stories() if data is None else texts(data, demo_tokenizer())
    tokenizer = demo_tokenizer()
    if budget.vocabulary != len(tokenizer):
        first = list(up_to(documents, LEARNT_FROM))
        tokenizer, documents = learnt(first, budget.vocabulary), chain(first, documents)
    wanted = budget.tokens + budget.held_out * budget.length
    ids = array("i")
    while len(ids) < wanted and (some := list(islice(documents, 64))):
        for one in tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]:
            ids.extend(one)
            ids.append(tokenizer.eos_token_id)
    if len(ids) < wanted:
        raise ValueError(f"--data {data} has {len(ids):,} tokens, and this budget reads {wanted:,}.")
    rows = torch.tensor(ids[:wanted]).view(-1, budget.length)
    return Text(rows[: -budget.held_out], rows[-budget.held_out :].clone(), tokenizer)


def demo_tokenizer() -> PreTrainedTokenizerBase:
    """The demo model's: 512 words and parts of words, with every byte among them."""
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def stories() -> Iterator[str]:
    """Generated ones, without an end."""
    rng = random.Random(0)
    while True:
        yield "\n".join(story(rng))


def up_to(documents: Iterator[str], characters: int) -> Iterator[str]:
    """The first documents with about so many characters."""
    for document in documents:
        yield document
        characters -= len(document)
        if characters <= 0:
            return


def learnt(documents: list[str], vocabulary: int) -> PreTrainedTokenizerBase:
    """Byte-level BPE of so many tokens at most."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)
