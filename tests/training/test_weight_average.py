"""The average of the weights beside one computed from every step's weights; saved, resumed and used as a model."""

from types import SimpleNamespace

import pytest
import torch
from hf_moe.training.weights.average import AVERAGE_FILE, WeightAverage, check_average
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_moe import MoeTrainer

from .balance_worker import train_one_step
from .models import hf_moe, olmoe

RUN = {"max_steps": 6, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2, "ema_decay": 0.7}


class Weights(TrainerCallback):
    """The weights after every step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: weight.detach().clone() for name, weight in model.named_parameters()})


def run(folder, model, **changes):
    weights = Weights()

    class Watched(MoeTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(weights)

    _, trainer = train_one_step(model, 1, trainer_class=Watched, keep_folder=folder, **RUN | changes)
    return trainer, weights.steps


def test_average_is_that_of_the_steps_and_resumes_bitwise(tmp_path):
    model = hf_moe()
    expected = {name: weight.detach().double() for name, weight in model.named_parameters()}
    trainer, steps = run(tmp_path / "a", model)
    for weights in steps:
        expected = {name: 0.7 * value + 0.3 * weights[name].double() for name, value in expected.items()}
    saved = load_file(tmp_path / "a" / "checkpoint-6" / AVERAGE_FILE)
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(saved[name].double(), value, rtol=1e-5, atol=1e-6)
        assert not torch.equal(saved[name], steps[-1][name])

    checkpoint = str(tmp_path / "a" / "checkpoint-4")
    resumed, _ = run(tmp_path / "b", hf_moe(seed=1), resume_from_checkpoint=checkpoint)
    assert all(torch.equal(resumed.average.averages[name], value) for name, value in saved.items())

    before = {name: value.clone() for name, value in model.state_dict().items()}
    with trainer.average.in_place_of_weights(model):
        assert all(torch.equal(weight, saved[name]) for name, weight in model.named_parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_frozen_weights_have_none_and_bfloat16_is_averaged_in_float32():
    model = olmoe().to(torch.bfloat16)
    model.model.embed_tokens.requires_grad_(False)
    average = WeightAverage(0.999)
    average.start(model)
    assert len(average.averages) == len(list(model.parameters())) - 1
    before = average.averages["lm_head.weight"].clone()
    with torch.no_grad():
        model.lm_head.weight += 1
    average.update(model)
    moved = average.averages["lm_head.weight"] - before  # steps that bfloat16 would lose
    torch.testing.assert_close(moved, 1e-3 * (model.lm_head.weight.float() - before), rtol=1e-2, atol=1e-6)


@pytest.mark.gpu
def test_a_gpu_goes_on_while_it_is_averaged():
    """Weights move as soon as they are copied."""
    model, average = hf_moe().cuda(), WeightAverage(0.7)
    average.start(model)
    expected = {name: weight.detach().double() for name, weight in model.named_parameters()}
    for step in range(5):
        average.let_move()
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(step + 1.0)
        average.update(model)
        expected = {name: 0.7 * expected[name] + 0.3 * x.detach().double() for name, x in model.named_parameters()}
    assert all(copy.is_pinned() for copy in average.copies.values())
    for name, value in average.averages.items():
        torch.testing.assert_close(value.double(), expected[name].cpu(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["is_fsdp_enabled", "is_deepspeed_enabled", "spread"])
def test_where_no_process_has_what_to_average(where):
    """The first FSDP flattens weights."""
    elsewhere = dict.fromkeys(("is_fsdp_enabled", "is_deepspeed_enabled", "spread"), False) | {where: True}
    trainer = SimpleNamespace(**elsewhere, accelerator=SimpleNamespace(is_fsdp2=False))
    with pytest.raises(ValueError, match="leave it out under DeepSpeed, the first FSDP and expert parallelism"):
        check_average(0.9, trainer)
    if where == "is_fsdp_enabled":
        trainer.accelerator.is_fsdp2 = True
        check_average(0.9, trainer)


@pytest.mark.parametrize("decay", [0.0, 1.0, 1.5])
def test_decay_that_averages_nothing(tmp_path, decay):
    with pytest.raises(ValueError, match=f"ema_decay is {decay}; it must be between 0 and 1"):
        run(tmp_path, hf_moe(), ema_decay=decay)


def test_checkpoint_without_an_average(tmp_path):
    run(tmp_path / "a", hf_moe(), ema_decay=None, max_steps=2)
    with pytest.raises(FileNotFoundError, match="saved without ema_decay") as error:
        run(tmp_path / "b", hf_moe(), resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert "\n" not in str(error.value)
