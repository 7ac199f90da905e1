"""A Hub on loopback that the real client talks to, and a small model to send there."""

import huggingface_hub
import pytest

from tests.conftest import tiny_model
from tests.training.conftest import tiny_tokenizer

from .server import TOKEN, Hub


@pytest.fixture
def hub(monkeypatch):
    """The client's constants were read from the environment when it was imported, so they are what is changed."""
    server = Hub()
    for name, value in {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    huggingface_hub.close_session()
    yield server
    server.stop()
    huggingface_hub.close_session()


@pytest.fixture
def folder(tmp_path):
    """A model of four shards, with a tokenizer."""
    path = tmp_path / "model"
    tiny_model(vocab_size=259).save_pretrained(path, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(path)
    return path
