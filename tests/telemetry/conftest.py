"""Tiny mixtures of experts, hf_moe's and Transformers' own, with a tokenizer, and two texts of odd lengths."""

import json

import pytest
from transformers import AutoTokenizer

from hf_moe.demo import DEMO_MODEL

from ..training.models import deepseek_v3, hf_moe, olmoe

FIELDS = {"vocab_size": 512, "max_position_embeddings": 29}
MODELS = {
    "hf_moe": lambda **changes: hf_moe(**FIELDS, n_group=1, topk_group=1, **changes),
    "olmoe": lambda **changes: olmoe(**FIELDS, **changes),
    "deepseek_v3": lambda **changes: deepseek_v3(**FIELDS, **changes),
}
STORY = "Once upon a time there was a little fox. She lived by the river and counted stones, 1, 2, 3.\n"


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A plain text and rows, in one folder."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "river.txt").write_text(STORY * 3)
    rows = [{"text": "A dog ran." * n, "id": n} for n in (1, 7, 3, 5)]
    (folder / "dogs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="session")
def saved(tmp_path_factory, tokenizer):
    """A tiny OLMoE of Transformers in a folder; the command's own test has a model of hf_moe."""
    folder = tmp_path_factory.mktemp("models") / "olmoe"
    MODELS["olmoe"]().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
