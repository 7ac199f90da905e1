"""MoeTrainer on every mixture of experts in Transformers: the balance loss reaches the routers, biases move."""

import pytest
import torch
from hf_moe.training.balance.moe_arguments import MoeTrainingArguments
from hf_moe.training.trainers.trainer import MoeTrainer

from tests.families import FAMILIES, tiny


def rows(count: int = 8) -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 100, (count, 9), generator=generator)
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_two_steps_balance_every_family(model_type, tmp_path):
    model = tiny(model_type)
    options = {"router_aux_loss_coef": 0.01, "gradient_accumulation_steps": 2, "max_steps": 2, "learning_rate": 1e-3}
    options |= {"per_device_train_batch_size": 2, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
    trainer = MoeTrainer(model, MoeTrainingArguments(str(tmp_path), logging_steps=1, **options), train_dataset=rows())
    biased = bool(trainer.selection_bias.biases)
    if biased:
        trainer.bias_speed = 1e-3
    before = {name: x.detach().clone() for name, x in trainer.selection_bias.biases.items()}
    routers = {id(x) for router in trainer.routers.values() for x in router.module.parameters() if x.dim() == 2}
    weights = {name: x.detach().clone() for name, x in model.named_parameters() if id(x) in routers}
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 2 and all(entry["aux_loss"] > 0 for entry in logged)
    moved = [name for name, x in model.named_parameters() if name in weights and not torch.equal(x, weights[name])]
    assert moved
    for name, bias in trainer.selection_bias.biases.items():
        steps = (bias - before[name]).abs() / 1e-3
        assert steps.max() > 0.5 and (steps.round() - steps).abs().max() < 0.01, name
