import pytest
import torch
from hf_moe.training.trainers.multi_step import multi_step_schedule

from .balance_worker import train_one_step
from .models import hf_moe

STEP = {"lr_milestones": [0.8, 0.9], "lr_scheduler_type": "constant_with_warmup", "save_strategy": "steps"}
STEP |= {"max_steps": 10, "warmup_steps": 3, "learning_rate": 1e-2, "lr_gamma": 0.1, "save_steps": 4}


@pytest.mark.parametrize(("warmup", "first"), [(0, [1, 1, 1]), (2, [0, 0.5, 1])])
def test_schedule(warmup, first):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule, rates = multi_step_schedule(optimizer, warmup, 20, [0.8, 0.9], 0.316), []
    for _ in range(20):
        rates.append(schedule.get_last_lr()[0] / 2)
        optimizer.step()
        schedule.step()
    # 80% of 20 steps are 16.
    assert rates == pytest.approx([*first, *[1] * 13, 0.316, 0.316, 0.316**2, 0.316**2])


def test_a_resumed_run_has_the_same_learning_rates(tmp_path):
    _, trainer = train_one_step(hf_moe(), 1, keep_folder=tmp_path / "a", **STEP)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([0, 1e-2 / 3, 2e-2 / 3, *[1e-2] * 5, 1e-3, 1e-4])
    again = {"resume_from_checkpoint": str(tmp_path / "a" / "checkpoint-8"), "keep_folder": tmp_path / "b"}
    _, trainer = train_one_step(hf_moe(), 1, **STEP, **again)
    assert [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry] == rates


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr_scheduler_type": "linear"}, "lr_scheduler_type is linear"),
        ({"lr_milestones": [0.9, 0.8]}, r"lr_milestones is \[0.9, 0.8\]"),
        ({"lr_milestones": [8.0]}, r"lr_milestones is \[8.0\]"),
        ({"lr_gamma": 1.0}, "lr_gamma is 1.0"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        train_one_step(hf_moe(), 1, **STEP | changes)
