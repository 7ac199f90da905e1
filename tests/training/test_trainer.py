"""The balance losses reach the gradient exactly once, and a checkpoint restores every weight."""

import copy

import pytest
import torch
from datasets import Dataset
from hf_moe.training.output.checkpoints import last_checkpoint
from hf_moe.training.trainers.sft_trainer import MoeSFTConfig, MoeSFTTrainer
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hf_moe.reading import whole_model

from .conftest import MODELS, tiny_hf_moe, tiny_tokenizer

ROWS = Dataset.from_list(
    [{"text": text} for text in ("a cat", "three blind mice", "no", "it runs", "one two 3", "zz")]
)


class Gradients(TrainerCallback):
    """The gradient of each optimizer step, before the step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})


def make_trainer(model, folder, callbacks=(), **arguments) -> MoeSFTTrainer:
    args = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return MoeSFTTrainer(
        model=model,
        args=MoeSFTConfig(output_dir=str(folder), **args | arguments),
        train_dataset=ROWS,
        eval_dataset=ROWS.select(range(3)),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
    )


def gradient_of_one_step(folder, aux_coef, z_coef, **arguments):
    """The gradient, and the micro-batches that it came from."""
    model, gradients, batches = tiny_hf_moe(), Gradients(), []
    model.config.router_aux_loss_coef, model.config.router_z_loss_coef = aux_coef, z_coef
    trainer = make_trainer(model, folder, [gradients], **arguments)
    compute_loss = trainer.compute_loss

    def remember(model, inputs, *args, **kwargs):
        batches.append({name: inputs[name].clone() for name in ("input_ids", "attention_mask", "labels")})
        return compute_loss(model, inputs, *args, **kwargs)

    trainer.compute_loss = remember
    trainer.train()
    assert len(gradients.steps) == 1
    return gradients.steps[0], batches


def slow_router_loss(model, batch, aux_coef, z_coef):
    """Token by token: the mean over layers of aux_coef E / (K T) sum_i count_i mean_t p_ti + z_coef mean_t lse_t^2."""
    outputs = model(batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True)
    experts, top_k, total = model.config.num_experts, model.config.num_experts_per_tok, 0.0
    for logits in outputs.router_logits:
        tokens = [
            row for row, counts in zip(logits, batch["attention_mask"].reshape(-1).bool(), strict=True) if counts
        ]
        chosen = [expert for row in tokens for expert in row.topk(top_k).indices.tolist()]
        probability = sum(row.softmax(-1) for row in tokens) / len(tokens)
        for expert in range(experts):
            share = chosen.count(expert) / (top_k * len(tokens))
            total = total + aux_coef * experts * share * probability[expert]
        total = total + z_coef * sum(row.exp().sum().log() ** 2 for row in tokens) / len(tokens)
    return total / len(outputs.router_logits)


LOSSES = {
    "default": {},
    "micro-batches": {"gradient_accumulation_steps": 3, "balance_over": "micro_batch"},
    "checkpointing": {"gradient_checkpointing": True},
    "dft": {"loss_type": "dft"},
    "label-smoothing": {"label_smoothing_factor": 0.2},
}


@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_carries_the_router_losses_exactly_once(tmp_path, case):
    aux_coef, z_coef = 0.7, 0.03
    without, batches = gradient_of_one_step(tmp_path / "0", 0.0, 0.0, **LOSSES[case])
    gradient, same_batches = gradient_of_one_step(tmp_path / "1", aux_coef, z_coef, **LOSSES[case])
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, same_batches, strict=True))
    assert any((batch["attention_mask"] == 0).any() for batch in batches)

    model = tiny_hf_moe()
    sum(slow_router_loss(model, batch, aux_coef, z_coef) / len(batches) for batch in batches).backward()
    for name, parameter in model.named_parameters():
        expected = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(gradient[name] - without[name], expected, rtol=1e-3, atol=2e-5, msg=name)
    assert model.model.layers[1].mlp.gate.weight.grad.abs().max() > 1e-2


def test_cross_entropy_gradient_is_that_of_the_model(tmp_path):
    gradient, batches = gradient_of_one_step(tmp_path, 0.0, 0.0)
    model = tiny_hf_moe()
    model(**batches[0], output_router_logits=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_evaluation_loss_is_cross_entropy_and_router_losses_are_logged_apart(tmp_path):
    model = tiny_hf_moe()
    model.config.router_aux_loss_coef, model.config.router_z_loss_coef = 5.0, 7.0
    trainer = make_trainer(model, tmp_path)
    metrics = trainer.evaluate()
    batch = next(iter(trainer.get_eval_dataloader()))
    model = tiny_hf_moe().eval()
    with torch.no_grad():
        logits, labels = model(**batch).logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        assert metrics["eval_loss"] == pytest.approx(
            torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5
        )
        assert metrics["eval_aux_loss"] == pytest.approx(slow_router_loss(model, batch, 1, 0).item(), rel=1e-5)
        assert metrics["eval_z_loss"] == pytest.approx(slow_router_loss(model, batch, 0, 1).item(), rel=1e-5)


def test_coefficient_in_the_arguments_wins_and_is_saved(tmp_path):
    trainer = make_trainer(tiny_hf_moe(), tmp_path, router_aux_loss_coef=0.25)
    assert trainer.balance.coefficients
    assert (trainer.moe.config.router_aux_loss_coef, trainer.moe.config.output_router_logits) == (0.25, False)
    assert not make_trainer(tiny_hf_moe(), tmp_path, router_aux_loss_coef=0.0).balance.coefficients


@pytest.fixture(scope="module", params=MODELS)
def interrupted(request, tmp_path_factory):
    """Two of four steps; the folder with checkpoint-2, the model as it was then, and the one after all four."""
    folder, model = tmp_path_factory.mktemp("run"), MODELS[request.param]()
    at_two = {}

    class Remember(TrainerCallback):
        def on_save(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                at_two.update(copy.deepcopy(model.state_dict()))

    make_trainer(model, folder, [Remember()], max_steps=4, save_strategy="steps", save_steps=2).train()
    return request.param, folder, at_two, model.state_dict()


def test_checkpoint_restores_every_weight_bitwise(interrupted, tmp_path):
    name, folder, at_two, _ = interrupted
    model = MODELS[name](seed=1)
    assert not any(torch.equal(value, at_two[key]) for key, value in model.state_dict().items() if "norm" not in key)
    make_trainer(model, tmp_path)._load_from_checkpoint(str(folder / "checkpoint-2"))
    assert model.state_dict().keys() == at_two.keys()
    assert any(key.endswith("experts.gate_up_proj") for key in at_two)
    for key, value in model.state_dict().items():
        assert torch.equal(value, at_two[key]), key


def test_resumed_training_ends_bitwise_where_unbroken_training_ends(interrupted, tmp_path):
    name, folder, _, at_four = interrupted
    model = MODELS[name](seed=1)
    make_trainer(model, tmp_path, max_steps=4).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    for key, value in model.state_dict().items():
        assert torch.equal(value, at_four[key]), key


def test_best_model_is_restored_bitwise(interrupted, tmp_path):
    name, folder, at_two, _ = interrupted
    model = MODELS[name](seed=1)
    trainer = make_trainer(model, tmp_path)
    trainer.state.best_model_checkpoint = str(folder / "checkpoint-2")
    trainer._load_best_model()
    assert all(torch.equal(value, at_two[key]) for key, value in model.state_dict().items())


def test_weight_missing_from_a_checkpoint_is_an_error(tmp_path):
    tiny_hf_moe().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.2.mlp.experts.down_proj"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    message = r"lacks 1 of the model's weights, the first of them model.layers.2.mlp.experts.down_proj"
    with pytest.raises(ValueError, match=message):
        whole_model(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        make_trainer(tiny_hf_moe(), tmp_path / "out")._load_from_checkpoint(str(tmp_path))


def test_last_checkpoint_is_the_newest_complete_one(tmp_path):
    assert last_checkpoint(tmp_path / "absent") is None
    for step, state in ((9, "{}"), (80, "{}"), (100, '{"epo'), (200, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-300-old").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-80")
