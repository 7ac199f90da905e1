"""A step whose micro-batches are run once, their graphs held, is the step that is counted first, bit for bit."""

import pytest
import torch
from hf_moe.training.balance.step import Step
from hf_moe.training.trainers import holding

from hf_moe import MoeSFTConfig, MoeTrainer

from .balance_worker import COEFFICIENTS, NONE, difference, forwards_of, train_one_step
from .models import hf_moe
from .test_balance import EXPLORATION, Sft
from .test_distil import train as distil
from .test_multi_token import TRAINERS as MULTI_TOKEN
from .test_multi_token import with_modules

SFT = {"trainer_class": Sft, "config_class": MoeSFTConfig, "bf16": False}
ALL = 7  # micro-batches of 32 rows: six of 5, and one of 2


@pytest.fixture(autouse=True)
def much_memory(monkeypatch):
    """Whatever else this machine does."""
    monkeypatch.setitem(holding.FREE, "cpu", lambda device: 2**40)


def epoch(accumulation: int, model=lambda: hf_moe(**EXPLORATION), **changes):
    """32 rows in steps of which the last is a shorter one."""
    arguments = {"per_device_train_batch_size": 5, "max_steps": -1, "num_train_epochs": 1}
    torch.manual_seed(3)
    return train_one_step(
        model(), accumulation, **COEFFICIENTS | arguments | {"gradient_checkpointing": True} | changes
    )


def assert_same(one, other) -> None:
    """Gradients of the last step, weights, logs, and the random numbers that come next."""
    for a, b in ((one[0], other[0]), (one[1].model.state_dict(), other[1].model.state_dict())):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert logged(one[1]) == logged(other[1])


def logged(trainer) -> list[dict]:
    times = ("runtime", "per_second")
    return [{k: v for k, v in entry.items() if not k.endswith(times)} for entry in trainer.state.log_history]


@pytest.fixture
def counted(monkeypatch):
    """What a training returns, and its forwards and random state at the end, where nothing is held."""

    def run(train, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(holding, "can_hold", lambda *args: False)
            return *forwards_of(train, *args, **kwargs), torch.get_rng_state()

    return run


@pytest.mark.parametrize("accumulation", [1, 2, 3, ALL])
@pytest.mark.parametrize("trainer", [{}, SFT], ids=["trainer", "sft"])
def test_a_held_step_is_a_counted_step(counted, trainer, accumulation):
    """With dropout, jitter and all losses."""
    held, forwards = forwards_of(epoch, accumulation, **trainer)
    state = torch.get_rng_state()
    expected, others, its_state = counted(epoch, accumulation, **trainer)
    assert_same(held, expected)
    assert torch.equal(state, its_state)
    alone = {1: ALL}.get(accumulation, ALL % accumulation == 1)  # micro-batches that are a step: there are no others
    assert (forwards, others) == (ALL, 2 * ALL - alone)


@pytest.mark.parametrize("trainer", MULTI_TOKEN)
def test_multi_token_prediction(counted, trainer):
    trainer_class, arguments, _ = MULTI_TOKEN[trainer]
    arguments = {**arguments, "gradient_checkpointing": True, "model": with_modules, "trainer_class": trainer_class}
    held, forwards = forwards_of(epoch, 3, **arguments)
    expected, others, _ = counted(epoch, 3, **arguments)
    assert_same(held, expected)
    assert (forwards, others) == (ALL, 2 * ALL - 1)


def test_distillation(counted, tmp_path):
    arguments = {"router_aux_loss_coef": 0.1, "max_steps": 2, "learning_rate": 1e-2, "gradient_checkpointing": True}
    held, forwards = forwards_of(distil, tmp_path / "held", 4, **arguments)
    expected, others, _ = counted(distil, tmp_path / "counted", 4, **arguments)
    assert_same(held, expected)
    assert others - forwards == 2 * 4


def test_where_there_is_no_room_the_first_is_held_and_the_others_are_counted(counted, monkeypatch):
    expected, *_ = counted(epoch, 3)
    with monkeypatch.context() as patch:
        patch.setitem(holding.FREE, "cpu", lambda device: 0)
        held, forwards = forwards_of(epoch, 3)
    assert_same(held, expected)
    assert forwards == ALL + 2 * 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"gradient_checkpointing": False},
        {"balance_over": "micro_batch"},
        NONE,
        NONE | {"router_z_loss_coef": 1.0},
    ],
    ids=["no checkpointing", "each", "no loss", "tokens alone"],
)
def test_nothing_is_held_for_nothing(monkeypatch, arguments):
    held = []
    monkeypatch.setattr(Step, "begin_forward", lambda self: held.append(len(self.held)))
    epoch(3, **arguments)
    assert not any(held)


def test_a_broken_step_keeps_no_graph(monkeypatch):
    trainers = []

    class Broken(MoeTrainer):
        def see_routing(self, *args):
            trainers.append(self)
            assert self.step.held
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        epoch(3, trainer_class=Broken)
    assert not trainers[0].step.held


def test_room_is_what_gradients_and_moments_leave(monkeypatch):
    _, trainer = epoch(1)
    bytes_of = sum(x.nbytes for x in trainer.model.parameters())
    monkeypatch.setitem(holding.FREE, "cpu", lambda device: 3 * bytes_of + 1000)
    assert trainer.optimizer.state
    room = holding.ROOM * (2 * bytes_of + 1000)
    assert holding.fit(trainer, room - 1) and not holding.fit(trainer, room + 1)
    trainer.optimizer.state.clear()
    assert holding.fit(trainer, 499) and not holding.fit(trainer, 501)


@pytest.mark.gpu
def test_what_a_forward_keeps_is_measured_on_a_card(counted):
    held, forwards = forwards_of(epoch, 3, use_cpu=False)
    expected, *_ = counted(epoch, 3, use_cpu=False)
    assert forwards == ALL
    assert difference(held[0], expected[0]) < 1e-4
