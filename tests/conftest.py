"""Fixtures that the whole suite shares: tiny configurations on odd sizes, and the shared data where it exists."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when huggingface_hub is imported

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported, which importing hf_moe does

import transformers
from transformers import ContinuousBatchingConfig

import hf_moe
from hf_moe.model import decoding

# HF_MOE_TEST_DEVICE=cuda runs the whole suite there: every tensor a test makes lands on it.
if "HF_MOE_TEST_DEVICE" in os.environ:
    torch.set_default_device(os.environ["HF_MOE_TEST_DEVICE"])

# Continuous batching would take most of the free memory, of whatever device.
FEW_PAGES = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def compiled_for_one_test():
    """Dynamo counts what it compiled for one code object, and every model shares its host's `forward`: the ninth
    model compiled in a process would be over its limit, and which test that is would depend on the order."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of trained checkpoints and texts beside the repository."""
    if not (SHARED / "data").is_dir():
        pytest.skip("needs ../shared/data")
    return SHARED / "data"


def since(minor: int, why: str):
    """Skip a test on an older host, for what that itself can't do."""
    here = tuple(map(int, transformers.__version__.split(".")[:2]))
    return pytest.mark.skipif(here < (5, minor), reason=f"until Transformers 5.{minor - 1} {why}")


# The host's fallback of a grouped product, which a CPU takes.
compiles_backward = since(23, "the backward pass of its own grouped product does not compile on a CPU")


def tiny_config(**changes) -> hf_moe.HfMoeConfig:
    """Three layers (one dense), odd sizes, 7 experts of which 3 are active."""
    fields = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,  # outputs far from uniform, so that a wrong one shows
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return hf_moe.HfMoeConfig(**{**fields, **changes})


def tiny_model(**changes) -> hf_moe.HfMoeForCausalLM:
    torch.manual_seed(1)
    return hf_moe.HfMoeForCausalLM(tiny_config(**changes)).eval()


@pytest.fixture
def cache_is_forgotten(monkeypatch):
    """Every forward begins with a new cache, as where the host calls it something that a model does not know."""
    forward = hf_moe.HfMoeModel.forward

    def forgetful(self, *args, past_key_values=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(hf_moe.HfMoeModel, "forward", forgetful)
    monkeypatch.setattr(decoding, "recordable", lambda model: False)  # a recorded step would find no cache, and raise


def on_the_gpu(model, ids):
    """Both there, for what Transformers does between a GPU and the host's memory only."""
    return model.to("cuda"), ids.to("cuda")


def tokens(batch: int = 2, length: int = 11, vocab_size: int = 97, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    ids = torch.randint(1, vocab_size, (batch, length), generator=generator, device="cpu")
    return ids.to(torch.get_default_device())


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
