"""A tiny model, a byte-level tokenizer and a few rows: enough for a whole run on one core in a second or two."""

import json
import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from hf_moe import HfMoeConfig, HfMoeForCausalLM

SPECIAL = ["<pad>", "<s>", "</s>"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and no chat template."""
    alphabet = SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def remade(change) -> PreTrainedTokenizerFast:
    """The same after `change` of what its file says."""
    made = tiny_tokenizer()
    change(said := json.loads(made.backend_tokenizer.to_str()))
    names = {name: getattr(made, name) for name in ("pad_token", "bos_token", "eos_token")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(said)), **names)


def swapped(one: str = "a", other: str = "b") -> PreTrainedTokenizerFast:
    """One that gives two letters each other's ids."""

    def swap(said: dict) -> None:
        vocab = said["model"]["vocab"]
        vocab[one], vocab[other] = vocab[other], vocab[one]

    return remade(swap)


SIZES = {
    "vocab_size": 259,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_hf_moe(seed: int = 0) -> HfMoeForCausalLM:
    torch.manual_seed(seed)
    mlp_layer_types = ["dense", "sparse", "sparse"]
    # Far from balance and from small logits, so that the router losses have gradients worth comparing.
    return HfMoeForCausalLM(HfMoeConfig(**SIZES, mlp_layer_types=mlp_layer_types, initializer_range=0.3))


def tiny_olmoe(seed: int = 0) -> OlmoeForCausalLM:
    torch.manual_seed(seed)
    return OlmoeForCausalLM(OlmoeConfig(**SIZES))


MODELS = {"hf_moe": tiny_hf_moe, "olmoe": tiny_olmoe}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_hf_moe().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def conversation(generator: random.Random) -> dict:
    word = generator.choice(["red", "green", "blue"]) * generator.randint(1, 3)
    return {
        "messages": [{"role": "user", "content": f"Say {word}."}, {"role": "assistant", "content": f"{word}, {word}!"}]
    }


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """train.jsonl (41 conversations) and val.jsonl (7)."""
    folder, generator = tmp_path_factory.mktemp("data"), random.Random(0)
    for name, count in (("train", 41), ("val", 7)):
        write_rows(folder / f"{name}.jsonl", [conversation(generator) for _ in range(count)])
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """train.jsonl (80 texts) and val.jsonl (6), of 6 to 360 letters."""
    folder, generator = tmp_path_factory.mktemp("text"), random.Random(0)
    for name, count in (("train", 80), ("val", 6)):
        words = [
            [generator.choice(["red", "green", "blue"]) for _ in range(generator.randint(2, 60))] for _ in range(count)
        ]
        write_rows(folder / f"{name}.jsonl", [{"text": " ".join(text)} for text in words])
    return folder


@pytest.fixture(autouse=True, scope="session")
def datasets_cache(tmp_path_factory):
    """Rows are cached here rather than in the user's cache."""
    import datasets

    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
