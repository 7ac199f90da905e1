"""A run's weights lie where a new model's lie, whatever file they come from."""

import copy

import pytest
import torch
from hf_moe.training.main import parse
from hf_moe.training.stages.loading import load_trained_model
from hf_moe.training.weights.alignment import BYTES
from safetensors.torch import load_file, save_file

from .models import hf_moe_biased


@pytest.fixture(params=range(0, BYTES, 8))
def folder(request, tmp_path):
    """A model whose file has a header of this many bytes more."""
    hf_moe_biased().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "x": " " * request.param})
    return tmp_path / "model"


def test_loaded_weights_are_aligned_and_the_same(folder):
    given = ["--model_name_or_path", str(folder), "--train_data", "x.jsonl", "--output_dir", "out"]
    model_args, _, args, *_ = parse(["tiny/sft", *given])
    model = load_trained_model(str(folder), model_args, args)
    tensors = model.state_dict()
    assert not [name for name, x in tensors.items() if x.data_ptr() % BYTES]
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(tensors[name], x) for name, x in saved.items())
    ids = torch.arange(1, 40).view(1, -1)
    assert torch.equal(model(ids).logits, copy.deepcopy(model)(ids).logits)  # as a policy and its reference
