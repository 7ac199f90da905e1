"""One optimizer step: its micro-batches, and their counts, known before the first backward pass."""

import torch
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states

from hf_moe.model.balancing import Statistics
from hf_moe.routers import captured

from .counts import Balance, count_tokens
from .multi_token import looking_ahead


class RandomState:
    """The random generators as they are now: the CPU's, and those of the devices that hold `tensors`."""

    def __init__(self, tensors: list[torch.Tensor]):
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*tensors)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        set_device_states(self.devices, self.states)


class Step:
    """What is known of an optimizer step while its micro-batches pass, one after the other.

    `batches` are raw until it begins, and then what the model sees of them. `counted` holds the whole step's counts,
    router by router, of this process; None where one micro-batch is the step. `rows` are the sums for the metrics so
    far, `losses` those of micro-batches, `mtp_loss` this process's share of the step's, not weighted.
    """

    def __init__(self, batches: list[dict]):
        self.batches = batches
        self.counted: dict[str, Statistics] | None = None
        self.states: list[RandomState] = []
        self.rows: torch.Tensor | None = None
        self.losses: list[torch.Tensor] = []
        self.mtp_loss: torch.Tensor | float = 0.0

    def look_ahead(self, model: nn.Module, balance: Balance) -> None:
        """Count the whole step, if it has several micro-batches; to be called before the first one's forward."""
        if len(self.batches) < 2:
            return
        if balance.needs_forward:
            self.counted, self.states = count_ahead(model, balance, self.batches)
        else:
            self.counted = dict.fromkeys(balance.routers, add_all([count_tokens(inputs) for inputs in self.batches]))

    def begin_forward(self) -> None:
        """Give a counted micro-batch the random state it was counted with, so that it takes the same routes."""
        if self.states:
            self.states.pop(0).restore()


@torch.no_grad()
def count_ahead(model: nn.Module, balance: Balance, batches: list[dict]) -> tuple[dict, list[RandomState]]:
    """Who is chosen in the micro-batches, from a forward without gradient, and the random state each began with."""
    weights = [parameter for router in balance.routers.values() for parameter in router.module.parameters()]
    counted, states = [], []
    for inputs in batches:
        states.append(RandomState(weights))
        with captured(balance.routers, balance.top_k) as routings, looking_ahead(balance.multi_token):
            model(**inputs | balance.light)
        counted.append(balance.count(balance.read(routings, inputs)))
    return {name: add_all([counts[name] for counts in counted]) for name in counted[0]}, states


def add_all(counts: list[Statistics]) -> Statistics:
    """Counts of several batches together."""
    return Statistics(*(torch.stack(parts).sum(dim=0) for parts in zip(*counts, strict=True)))
