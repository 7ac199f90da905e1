"""A run resumed from a checkpoint ends bitwise where the unbroken one ends: weights, experts, biases, optimizer."""

import copy

import pytest
import torch
from datasets import Dataset
from hf_moe.training.output.resuming import FILE
from hf_moe.training.output.spread import FOLDER, check_parts
from hf_moe.training.weights.groups import train_group
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hf_moe import MoeTrainer

from .balance_worker import train_one_step
from .models import deepseek_v3, hf_moe, olmoe, rows

# Random routes and counted steps, so that a random state restored too early or too late shows.
OURS = {"router_type": "sigmoid_topk", "norm_topk_prob": True}
OURS |= {"router_args": {"selection_bias": True, "jitter": 0.3}, "attention_dropout": 0.2}
MODELS = {
    "hf_moe": lambda seed=0: hf_moe(seed, **OURS),
    "olmoe": lambda seed=0: olmoe(seed, attention_dropout=0.2),
    "deepseek_v3": lambda seed=0: deepseek_v3(seed, attention_dropout=0.2),
}
SPEED = {"hf_moe": 1e-2, "olmoe": 0.0, "deepseek_v3": 1e-2}


class Remember(TrainerCallback):
    """The model as it was when each checkpoint was written."""

    def __init__(self):
        self.states = {}

    def on_save(self, args, state, control, model=None, **kwargs):
        self.states[state.global_step] = copy.deepcopy(model.state_dict())


class Evaluated(MoeTrainer):
    def __init__(self, *args, **kwargs):
        self.remembered = Remember()
        super().__init__(*args, eval_dataset=Dataset.from_list(rows(5, seed=5)), **kwargs)
        self.add_callback(self.remembered)


def run(name: str, folder, seed: int = 0, **changes):
    arguments = {
        "max_steps": 6,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        "per_device_train_batch_size": 3,  # 32 rows: the last step of an epoch is short
        "router_aux_loss_coef": 0.1,
        "router_bias_update_speed": SPEED[name],
        "eval_strategy": "steps",
        "eval_steps": 2,
        "keep_folder": folder,
    }
    model = MODELS[name](seed)
    _, trainer = train_one_step(model, 4, trainer_class=Evaluated, **arguments | changes)
    return model, trainer


@pytest.fixture(scope="module", params=MODELS)
def unbroken(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    model, trainer = run(request.param, folder)
    return request.param, folder, trainer.remembered.states, model.state_dict(), trainer.state.log_history


def assert_same(state, expected):
    assert state.keys() == expected.keys() and any("experts" in key for key in state)
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


def test_resumed_run_ends_bitwise_where_the_unbroken_one_ends(unbroken, tmp_path):
    name, folder, _, at_end, history = unbroken
    # A new process has another model in memory, and other biases.
    model, trainer = run(name, tmp_path, seed=1, resume_from_checkpoint=str(folder / "checkpoint-4"))
    assert_same(model.state_dict(), at_end)
    times = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    for entry, expected in zip(trainer.state.log_history[:-1], history[:-1], strict=True):
        assert entry | dict.fromkeys(times) == expected | dict.fromkeys(times)
    for number, state in trainer.optimizer.state_dict()["state"].items():
        saved = torch.load(folder / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"][number]
        assert all(torch.equal(state[key], saved[key]) for key in saved)


def test_best_model_is_restored_bitwise(unbroken, tmp_path):
    name, _, _, _, _ = unbroken
    # The highest loss is called the best, so that it is not the last.
    model, trainer = run(name, tmp_path, load_best_model_at_end=True, greater_is_better=True)
    best = trainer.state.best_global_step
    assert best < 6
    assert_same(model.state_dict(), trainer.remembered.states[best])


def test_checkpoint_that_lacks_a_weight_is_an_error(unbroken, tmp_path):
    name, folder, *_ = unbroken
    path = folder / "checkpoint-2" / "model.safetensors"
    weights = load_file(path)
    experts = [key for key in weights if "layers.1.mlp.experts" in key and "down_proj" in key]
    # Transformers writes its experts one by one: one of them alone may be missing, or all.
    for lost in (experts, experts[-1:]):
        save_file({key: x for key, x in weights.items() if key not in lost}, path, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"1 of the model's weights.*layers.1.mlp.experts.down_proj") as error:
            run(name, tmp_path, resume_from_checkpoint=str(folder / "checkpoint-2"))
        assert "\n" not in str(error.value)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("place", ["a/b", "{folder}/absent"], ids=["like-a-hub-id", "absent"])
def test_folder_that_is_not_there_is_an_error_and_not_looked_for_on_the_hub(tmp_path, place):
    place = place.format(folder=tmp_path)
    with pytest.raises(ValueError, match=f"resume_from_checkpoint: there is no folder {place}"):
        run("hf_moe", tmp_path, resume_from_checkpoint=place)


def test_checkpoint_of_another_optimizer_is_an_error(unbroken, tmp_path):
    name, folder, *_ = unbroken
    (folder / "checkpoint-4" / FILE).unlink(missing_ok=True)  # which would tell it first
    with pytest.raises(ValueError, match="checkpoint-4 is of a run with another optimizer, which has no dampening"):
        run(name, tmp_path, resume_from_checkpoint=str(folder / "checkpoint-4"), optim="sgd")


def test_checkpoint_of_other_trained_weights_is_an_error(unbroken, tmp_path):
    name, folder, *_ = unbroken
    (folder / "checkpoint-4" / FILE).unlink(missing_ok=True)
    model = MODELS[name](seed=0)
    train_group(model, "attention_only")
    with pytest.raises(ValueError, match=r"checkpoint-4 is of a run that trained other weights .*: choose"):
        train_one_step(model, 4, keep_folder=tmp_path, resume_from_checkpoint=str(folder / "checkpoint-4"))


def test_optimizer_is_read_as_it_was_written(tmp_path):
    check_parts(str(tmp_path), False)
    with pytest.raises(ValueError, match="has its optimizer whole, and this run would read it in parts: give"):
        check_parts(str(tmp_path), True)
    (tmp_path / FOLDER).mkdir()
    check_parts(str(tmp_path), True)
    with pytest.raises(ValueError, match="has its optimizer in parts, and this run would read it whole: give"):
        check_parts(str(tmp_path), False)
