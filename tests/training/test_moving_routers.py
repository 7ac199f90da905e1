"""Routers with a state of their own in training: it moves once a step, by all its tokens, and holds the mean number of
experts a token."""

import pytest
import torch

from hf_moe.routers import find_routers
from tests.processes import on_two_processes

from .balance_worker import NONE, train_one_step
from .models import hf_moe
from .moving_worker import moved

E, K = 6, 2
STATES = {
    "expert_threshold": ("threshold", {"decay": 0.8}, K),
    "relu": ("l1_coef", {"l1_start": 1e-3, "l1_factor": 1.2}, K),
    "null_experts": ("null_bias", {"null_experts": 3, "null_bias_speed": 5e-3}, K * E / (E + 3)),
}
MOVING = pytest.mark.parametrize("router_type", STATES)


def own(router_type: str, seed: int = 0, **changes):
    return hf_moe(seed, router_type=router_type, n_group=1, topk_group=1, **changes)


def states(model, name: str) -> list[torch.Tensor]:
    return [getattr(layer.mlp.gate, name).detach().clone() for layer in model.model.layers]


class Watched:
    """Of each training forward the mask of its tokens, and what each router answered."""

    def __init__(self, model):
        self.masks, self.answers = [], {name: [] for name in find_routers(model)}
        model.register_forward_pre_hook(self.see, with_kwargs=True)
        for name, router in find_routers(model).items():
            router.module.register_forward_hook(lambda module, args, out, name=name: self.answers[name].append(out))

    def see(self, module, args, kwargs):
        self.masks.append(kwargs["attention_mask"].flatten().bool())


@MOVING
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("coefficient", [0.0, 0.1])  # with a balance loss the step is counted before it is trained on
def test_it_moves_once_a_step_by_what_its_tokens_say(router_type, accumulation, coefficient):
    name, args, target = STATES[router_type]
    model = own(router_type, router_args=args)
    watched, before = Watched(model), states(model, name)
    train_one_step(model, accumulation, **NONE | {"router_aux_loss_coef": coefficient})
    masks = watched.masks[-accumulation:]
    tokens = sum(mask.sum().item() for mask in masks)
    for answers, start, found in zip(watched.answers.values(), before, states(model, name), strict=True):
        calls = list(zip(answers[-accumulation:], masks, strict=True))
        mean_k = sum((out[2][mask] < E).sum().item() for out, mask in calls) / tokens
        if router_type == "expert_threshold":
            for e in range(E):
                total = 0.0
                for out, mask in calls:
                    ranked = sorted(out[0][mask][:, e].double().sigmoid().tolist(), reverse=True)
                    total += ranked[round(K / E * len(ranked))] * len(ranked)
                assert found[e].item() == pytest.approx(0.8 * start[e].item() + 0.2 * total / tokens, abs=1e-6)
        elif router_type == "relu":
            assert found.item() == pytest.approx(start.item() * (1.2 if mean_k > target else 1 / 1.2), rel=1e-5)
        else:
            assert found.item() == pytest.approx(start.item() + (5e-3 if mean_k > target else -5e-3), abs=1e-7)
        assert not torch.equal(found, start)


def test_a_penalty_over_micro_batches_is_that_of_one_large_batch():
    (whole, trainer), (parts, _) = (
        train_one_step(own("relu", router_args={"l1_start": 0.5}), accumulation, **NONE) for accumulation in (1, 4)
    )
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    without, _ = train_one_step(own("relu", router_args={"l1_start": 0.0}), 1, **NONE)
    gates = [name for name in whole if ".gate." in name]
    assert gates and all((whole[name] - without[name]).norm() > 0.1 * without[name].norm() for name in gates)
    assert trainer.state.log_history[0]["penalty"] > 0.1


@MOVING
def test_it_holds_the_mean_number_of_experts(router_type):
    _, args, target = STATES[router_type]
    model = own(router_type, router_args=args)
    if router_type == "null_experts":  # which would begin there
        for layer in model.model.layers:
            torch.nn.init.constant_(layer.mlp.gate.null_bias, -0.2)
    options = {"max_steps": 80, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    _, trainer = train_one_step(model, 1, **NONE | options)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    numbers = [entry["router_experts_per_token"] for entry in log]
    near = 0.5 if router_type == "relu" else 0.25  # a penalty of so few steps swings
    assert abs(numbers[0] - target) > near + 0.1  # where it begins
    assert sum(numbers[-15:]) / 15 == pytest.approx(target, abs=near)
    assert log[-1]["loss"] < log[0]["loss"]


@MOVING
def test_a_run_ends_where_the_unbroken_one_ends(router_type, tmp_path):
    name, args, _ = STATES[router_type]
    options = {"max_steps": 4, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}
    options |= {"router_aux_loss_coef": 0.1, "per_device_train_batch_size": 4}
    unbroken = own(router_type, router_args=args)
    train_one_step(unbroken, 2, keep_folder=tmp_path / "run", **options)
    other = own(router_type, seed=1, router_args=args)
    folder = tmp_path / "run" / "checkpoint-2"
    train_one_step(other, 2, keep_folder=tmp_path / "again", resume_from_checkpoint=str(folder), **options)
    assert all(torch.equal(x, other.state_dict()[key]) for key, x in unbroken.state_dict().items())
    assert not torch.equal(states(unbroken, name)[0], states(own(router_type, router_args=args), name)[0])


def test_two_processes_move_them_as_one_does():
    two, one = on_two_processes("training/moving_worker.py"), moved(2, 1)
    assert two.keys() == one.keys()
    for kind, layers in one.items():
        for found, expected in zip(two[kind], layers, strict=True):
            assert found == pytest.approx(expected, abs=1e-6), kind
