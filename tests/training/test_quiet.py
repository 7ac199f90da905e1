"""What a run says on standard error: no name that a library gave up, and no advice that is wrong."""

import warnings

import pytest
import torch

from hf_moe import MoeTrainingArguments

from .policies import run_tiny, save_model

# The libraries' own, which no argument of ours changes.
OTHERS = ("torch.jit", "SwigPy", "swigvarlink")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("quiet") / "model")


@pytest.mark.parametrize("stage", ["dpo", "grpo"])
@pytest.mark.parametrize("words", ["--trainable all", "--lora_parts attention"], ids=["whole", "adapter"])
def test_no_warning_of_names_that_were_given_up(stage, words, model, tmp_path, capfd):
    """TRL unwraps, checkpoints and generates, beside a reference or an adapter."""
    extra = ["--max_steps", 1, "--save_steps", 1, "--beta", 0.1, "--activation_checkpointing", "true"]
    extra += ["--per_device_train_batch_size", 8, "--router_bias_update_speed", 0.0, *words.split()]
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run_tiny(stage, model, tmp_path / "out", *extra)
    seen = [x for x in seen if issubclass(x.category, FutureWarning | DeprecationWarning)]
    assert not [str(x.message) for x in seen if not any(name in str(x.message) for name in OTHERS)]
    said = capfd.readouterr().err
    assert "ignored" not in said and "pin_memory" not in said and "deprecated" not in said


@pytest.mark.parametrize("gpu", [True, False], ids=["one", "none"])
def test_memory_is_pinned_for_a_gpu_alone(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    assert MoeTrainingArguments(str(tmp_path)).dataloader_pin_memory == gpu
