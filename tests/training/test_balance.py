"""The balance losses over a whole step: their gradient, their routes, and what must not touch either."""

import subprocess
import sys

import pytest
import torch
from hf_moe.training.balance.metrics import FIRST_LOSS
from hf_moe.training.trainers.label_smoothing import ShiftedLabelSmoother
from transformers import TrainingArguments

from hf_moe import MoeSFTConfig, MoeSFTTrainer, MoeTrainer, MoeTrainingArguments
from tests.processes import on_two_processes

from .balance_worker import (
    COEFFICIENTS,
    HELD,
    MODELS,
    NONE,
    ROWS,
    difference,
    one_large_batch,
    step_difference,
    train_one_step,
)
from .conftest import tiny_tokenizer
from .models import collate, deepseek_v3, hf_moe, mixtral, olmoe, rows

LOSSES = {name.removesuffix("_coef"): name for name in COEFFICIENTS}


@pytest.mark.parametrize("accumulation", [1, 4, 16])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_gradient_of_micro_batches_is_that_of_one_large_batch(model, loss, accumulation):
    assert step_difference(model, LOSSES[loss], accumulation) < 1e-5


class Sft(MoeSFTTrainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, processing_class=tiny_tokenizer(), **kwargs)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_gradient_with_the_head_of_trl(model, loss):
    arguments = {"config_class": MoeSFTConfig, "bf16": False, "gradient_checkpointing": False}
    assert step_difference(model, LOSSES[loss], 4, trainer_class=Sft, **arguments) < 1e-5


def test_balance_over_micro_batches_is_another_gradient():
    loss = "router_aux_loss_coef"
    assert step_difference("hf_moe", loss, 1, balance_over="micro_batch") < 1e-5
    assert step_difference("hf_moe", loss, 16, balance_over="micro_batch") > 0.1


@pytest.fixture(scope="module")
def two_processes():
    return on_two_processes("training/balance_worker.py")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_gradient_of_two_processes_is_that_of_one_large_batch(two_processes, model, loss):
    found = {name: x for name, x in two_processes.items() if name.startswith(f"{model}/{LOSSES[loss]}/")}
    assert found and max(found.values()) < 1e-5, found


def test_two_processes_move_the_bias_and_count_as_one(two_processes):
    _, trainer = train_one_step(deepseek_v3(), 1, router_bias_update_speed=1e-3, log_each_router=True)
    assert two_processes["biases"] == {name: x.tolist() for name, x in trainer.selection_bias.biases.items()}
    logged = trainer.state.log_history[0]
    assert two_processes["logged"] == pytest.approx(logged, rel=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("model", MODELS)
def test_two_processes_run_held_micro_batches_once(two_processes, model, loss):
    assert two_processes[f"forwards/{model}/{LOSSES[loss]}"] == 4


def test_steps_of_two_processes_with_held_micro_batches_are_those_of_one(two_processes):
    _, trainer = train_one_step(deepseek_v3(), 4, **HELD | {"gradient_checkpointing": False})
    for entry, expected in zip(two_processes["held"], trainer.state.log_history, strict=False):
        assert entry == pytest.approx(expected, rel=1e-4)
    assert len(two_processes["held"]) == 3


EXPLORATION = {"router_args": {"jitter": 0.5, "dropout": 0.3}, "attention_dropout": 0.3}
SAMPLED = {"router_type": "gshard"}


@pytest.mark.parametrize("changes", [EXPLORATION, SAMPLED], ids=["jitter-and-dropout", "gshard"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_counted_routes_are_the_routes_taken(monkeypatch, changes, checkpointing):
    """Random routes are drawn once: the forward that counts and the one that trains take the same."""
    steps, end = [], MoeTrainer.end_routing_step

    def remember(self):
        steps.append(self.step)
        end(self)

    monkeypatch.setattr(MoeTrainer, "end_routing_step", remember)
    arguments = {"router_aux_loss_coef": 1.0, "gradient_checkpointing": checkpointing}
    train_one_step(hf_moe(**changes), 4, **arguments)
    (step,) = steps
    for counted, row in zip(step.counted.values(), step.rows.view(2, -1), strict=True):
        assert counted.tokens == row[0] == sum(len(x["input_ids"]) for x in rows(ROWS))
        assert counted.counts_E.tolist() == row[FIRST_LOSS + 1 :].tolist()
    # Nor does counting move the random state of the rest: without the loss's weight, nothing differs.
    torch.manual_seed(0)
    ahead, _ = train_one_step(hf_moe(**changes), 4, **(arguments | {"router_aux_loss_coef": 1e-20}))
    torch.manual_seed(0)
    without, _ = train_one_step(hf_moe(**changes), 4, **(arguments | {"router_aux_loss_coef": 0.0}))
    assert difference(ahead, without) < 1e-6


@pytest.mark.parametrize("model", MODELS)
def test_checkpointing_changes_neither_gradient_nor_counts(model):
    arguments = {**COEFFICIENTS, "log_each_router": True}
    gradient, trainer = train_one_step(MODELS[model](), 4, **arguments)
    same, checkpointed = train_one_step(MODELS[model](), 4, gradient_checkpointing=True, **arguments)
    assert difference(same, gradient) < 1e-5
    counted = [{k: v for k, v in x.state.log_history[0].items() if "router_" in k} for x in (trainer, checkpointed)]
    assert len(counted[0]) > 10 and counted[0] == pytest.approx(counted[1])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kwargs", [{"use_reentrant": True}, {"preserve_rng_state": True}], ids=["named", "default"])
def test_reentrant_checkpointing_is_refused(model, kwargs):
    arguments = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    with pytest.raises(ValueError, match="use_reentrant=True would cut router_z_loss_coef off"):
        train_one_step(MODELS[model](), 4, **arguments, **(NONE | {"router_z_loss_coef": 0.1}))
    train_one_step(MODELS[model](), 4, **arguments, **NONE)


def test_loss_is_logged_with_the_balance_losses_once():
    coefficients = NONE | {"router_aux_loss_coef": 3.0, "router_z_loss_coef": 0.3}
    _, plain = train_one_step(olmoe(), 4, **NONE)
    _, trainer = train_one_step(olmoe(), 4, **coefficients)
    plain, logged = plain.state.log_history[0], trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(plain["loss"] + 3 * logged["aux_loss"] + 0.3 * logged["z_loss"], rel=1e-3)
    assert logged["z_loss"] == pytest.approx(plain["z_loss"]) and "aux_loss" not in plain


def smoothed(logits, labels, epsilon=0.2):
    """(1 - eps) CE to the next token + eps mean over the vocabulary of CE."""
    log_probs, targets = logits[:, :-1].log_softmax(-1).flatten(0, 1), labels[:, 1:].flatten()
    kept = targets != -100
    log_probs, targets = log_probs[kept], targets[kept]
    return -((1 - epsilon) * log_probs[range(len(targets)), targets] + epsilon * log_probs.mean(-1)).mean()


def squared(outputs, labels, num_items_in_batch=None):
    return outputs.logits.square().sum() / 10_000


def balance_gradient(model: str) -> dict[str, torch.Tensor]:
    """That of 3 times the load-balancing loss alone."""
    gradient = one_large_batch(model)["router_aux_loss_coef"]
    without, _ = train_one_step(MODELS[model](), 1, **NONE)
    return {name: value - without[name] for name, value in gradient.items()}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_label_smoothing_shifts_labels_and_keeps_the_balance_losses(model, accumulation):
    reference, batch = MODELS[model]().train(), collate(rows(ROWS))
    smoothed(reference(**batch).logits, batch["labels"]).backward()
    extra = balance_gradient(model)
    expected = {name: x.grad + extra[name] for name, x in reference.named_parameters()}
    coefficients = NONE | {"router_aux_loss_coef": 3.0}
    gradient, trainer = train_one_step(MODELS[model](), accumulation, label_smoothing_factor=0.2, **coefficients)
    assert isinstance(trainer.label_smoother, ShiftedLabelSmoother)
    assert difference(gradient, expected) < 2e-5


@pytest.mark.parametrize("model", MODELS)
def test_a_loss_function_of_the_users_keeps_the_balance_losses(model):
    class Custom(MoeTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, compute_loss_func=squared, **kwargs)

    without, _ = train_one_step(MODELS[model](), 4, trainer_class=Custom, **NONE)
    coefficients = NONE | {"router_aux_loss_coef": 3.0}
    gradient, _ = train_one_step(MODELS[model](), 4, trainer_class=Custom, **coefficients)
    extra = balance_gradient(model)
    assert difference(gradient, {name: without[name] + extra[name] for name in without}) < 2e-5


def trainer_of(model, folder, arguments=MoeTrainingArguments, **changes):
    changes = {"report_to": "none", "use_cpu": True, "disable_tqdm": True} | changes
    return MoeTrainer(model=model, args=arguments(output_dir=str(folder), **changes), data_collator=collate)


def test_coefficients_come_from_arguments_or_configuration(tmp_path):
    """A number in a Transformers configuration is for a loss K times ours; one in the arguments is for ours."""
    ours = hf_moe(router_aux_loss_coef=0.02, seq_aux_loss_coef=0.3)
    host = mixtral(router_aux_loss_coef=0.02, output_router_logits=True)
    expected = {"router_aux_loss_coef": 0.02, "seq_aux_loss_coef": 0.3}
    assert trainer_of(ours, tmp_path, TrainingArguments).balance.coefficients == expected
    assert trainer_of(host, tmp_path, TrainingArguments).balance.coefficients == {"router_aux_loss_coef": 0.04}
    assert host.config.output_router_logits is False

    given = {"router_aux_loss_coef": 0.5, "seq_aux_loss_coef": 0.0, "router_z_loss_coef": 0.1}
    expected = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1}
    for model in (ours, host):
        assert trainer_of(model, tmp_path, **given).balance.coefficients == expected
    # What is saved means the same.
    assert ours.config.router_aux_loss_coef == 0.5 and ours.config.seq_aux_loss_coef == 0.0
    assert host.config.router_aux_loss_coef == 0.25
    assert trainer_of(host, tmp_path).balance.coefficients == {"router_aux_loss_coef": 0.5}


def dense():
    return hf_moe(mlp_layer_types=["dense", "dense"], router_aux_loss_coef=0.0)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (hf_moe, {"router_aux_loss_coef": -0.1}, "router_aux_loss_coef is -0.1; it must be at least 0"),
        (hf_moe, {"balance_over": "epoch"}, "balance_over is 'epoch'; it can be step or micro_batch"),
        (olmoe, {"device_aux_loss_coef": 0.1}, "device_aux_loss_coef is 0.1, but n_group of OlmoeForCausalLM is 1"),
        (olmoe, {"router_bias_update_speed": 1e-3}, "router_bias_update_speed is 0.001, but no router of Olmoe"),
        (dense, {"router_aux_loss_coef": 0.1}, "router_aux_loss_coef is 0.1, but HfMoeForCausalLM is not a Mixture"),
    ],
    ids=["negative", "balance_over", "groups", "bias", "dense"],
)
def test_arguments_without_a_use_are_refused(tmp_path, model, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        trainer_of(model(), tmp_path, **arguments)
    assert "\n" not in str(error.value)


def test_a_dense_model_trains_as_with_the_trainer():
    gradient, trainer = train_one_step(dense(), 4)
    assert gradient and not any(name.startswith("router") for name in trainer.state.log_history[0])


def test_policy_loss_has_the_weight_of_one_large_batch():
    """A policy's loss is a mean over tokens: cut into micro-batches, each counts by its tokens, as cross-entropy."""
    batch = collate(rows(5))
    model = hf_moe(router_type="reinforce", router_args={"policy_coef": 0.3, "baseline_coef": 0.2}, **NONE).train()
    items = int((batch["labels"][:, 1:] != -100).sum())

    def loss(**kwargs):
        torch.manual_seed(7)  # the same routes
        return model(**batch, **kwargs).loss.item()

    assert loss(num_items_in_batch=items) == pytest.approx(loss(), rel=1e-5)
    assert loss(num_items_in_batch=4 * items) == pytest.approx(loss() / 4, rel=1e-5)


@pytest.mark.parametrize("arguments", [{"label_smoothing_factor": 0.1}], ids=["label-smoothing"])
def test_a_policy_without_its_loss_is_refused(tmp_path, arguments):
    with pytest.raises(ValueError, match=r"\(reinforce\) learn from each token's loss.*use MoeTrainer without"):
        trainer_of(hf_moe(router_type="reinforce"), tmp_path, **arguments)
    trainer_of(hf_moe(router_type="reinforce"), tmp_path)


def test_a_model_from_model_init_is_balanced(tmp_path):
    """The Trainer builds it again when training begins."""
    arguments = MoeTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none", logging_steps=1, save_strategy="no"
    )
    trainer = MoeTrainer(model_init=lambda: olmoe(), args=arguments, train_dataset=rows(8), data_collator=collate)
    first = trainer.moe
    trainer.train()
    assert trainer.moe is trainer.model is not first
    assert trainer.state.log_history[0]["aux_loss"] > 1


def test_trainer_needs_neither_trl_nor_peft():
    code = """
import sys
sys.modules["peft"] = None  # as if it were not installed
import hf_moe
assert "trl" not in sys.modules and "hf_moe.training" not in sys.modules
from hf_moe import MoeTrainer
assert "trl" not in sys.modules
sys.modules["trl"] = None
try:
    from hf_moe import MoeSFTTrainer
except ImportError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "MoeSFTTrainer needs trl, which is not installed: pip install 'hf_moe[train]'\n", result
