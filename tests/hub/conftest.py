"""A Hub on loopback that the real client talks to, and a small model to send there."""

import os
import shutil
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.cli.conftest import command  # noqa: F401  (a fixture)
from tests.conftest import tiny_model, tokens
from tests.training.conftest import tiny_tokenizer

from .server import TOKEN, Hub

LOAD = """
import sys
class NoHfMoe:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hf_moe", "hf_moe_cli"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoHfMoe())
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
repo, revision, folder = sys.argv[1:]
where = {"revision": revision, "trust_remote_code": True}
AutoTokenizer.from_pretrained(repo, **where)
model = AutoModelForCausalLM.from_pretrained(repo, **where).eval()
ids = load_file(folder + "/ids.safetensors")["ids"]
save_file({"logits": model(ids).logits.detach()}, folder + "/logits.safetensors")
"""


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The client's constants were read from the environment when it was imported, so they are what is changed."""
    server = Hub()
    constants = {"ENDPOINT": server.url, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
    constants["HUGGINGFACE_CO_URL_TEMPLATE"] = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    constants["HF_HUB_CACHE"] = str(tmp_path / "cache")
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made with the first endpoint
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda seconds: None)  # between two tries
    huggingface_hub.close_session()
    yield server
    server.stop()
    huggingface_hub.close_session()


@pytest.fixture
def model():
    return tiny_model(vocab_size=259)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The model in five shards, with a tokenizer."""
    path = tmp_path_factory.mktemp("hub") / "saved"
    tiny_model(vocab_size=259).save_pretrained(path, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "model")


@pytest.fixture
def logits_from_hub(hub, tmp_path):
    """The logits that a repository's model gives where hf_moe cannot be imported and nothing is cached."""

    def load(repo_id: str, revision: str = "main") -> torch.Tensor:
        work = tmp_path / "elsewhere"
        work.mkdir()
        save_file({"ids": tokens(vocab_size=259)}, work / "ids.safetensors")
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(work / "home"), "HF_TOKEN": TOKEN}
        program = [sys.executable, "-c", LOAD, repo_id, revision, work]
        subprocess.run(program, env=environment | {"HF_HUB_DISABLE_XET": "1"}, cwd=work, check=True)
        return load_file(work / "logits.safetensors")["logits"]

    return load
