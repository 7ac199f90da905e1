"""A tokenizer, and a tiny random model of its vocabulary."""

import pytest
from transformers import AutoTokenizer

from hf_moe.demo import DEMO_MODEL
from tests.conftest import tiny_model


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture(scope="session")
def model(tokenizer):
    """One sparse layer and an MTP module; a few more logits than the tokenizer has tokens, as padded embeddings do."""
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vocabulary = {"vocab_size": len(tokenizer) + 5, "num_mtp_layers": 1, **ends}
    return tiny_model(num_hidden_layers=1, mlp_layer_types=["sparse"], **vocabulary)
