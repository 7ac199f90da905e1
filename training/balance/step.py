"""One optimizer step: its micro-batches, and their counts, known before the first backward pass."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states

from hf_moe.model.balancing import Statistics
from hf_moe.routers import Routing, captured

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


class Forward(NamedTuple):
    """A micro-batch's forward for training, with its graph: what the trainer was given, what the routers did, and what
    the decoder gave where the trainer computes the loss of its MTP modules. `losses` are the micro-batch's share of
    each balance loss, router by router; None of a forward that was run before the step was counted."""

    loss: torch.Tensor
    outputs: Any
    routings: dict[str, Routing]
    decoded: list
    losses: dict[str, torch.Tensor] | None


class Step:
    """What is known of an optimizer step while its micro-batches pass, one after the other.

    `batches` are raw until it begins, and then what the model sees of them. `counted` holds the whole step's counts,
    router by router, of this process; None where one micro-batch is the step. `held` are the forwards of the first
    micro-batches, run ahead and still to go back; those of the others are counted without gradient and run again, from
    the random `states` that they were counted with. `rows` are the sums for the metrics so far, `observed` those for
    routers that move something themselves, `losses` those of micro-batches, `mtp_loss` this process's share of the
    step's, not weighted.

    Random numbers are drawn in the order of the micro-batches, and each forward for training draws those that it would
    draw if nothing were run ahead, whether it is held or not.
    """

    def __init__(self, batches: list[dict]):
        self.batches = batches
        self.counted: dict[str, Statistics] | None = None
        self.held: list[Forward] = []
        self.states: list[RandomState] = []
        self.rows: torch.Tensor | None = None
        self.observed: torch.Tensor | None = None
        self.losses: list[torch.Tensor] = []
        self.mtp_loss: torch.Tensor | float = 0.0

    def look_ahead(self, model: nn.Module, balance: Balance, forwards: Iterator[Forward]) -> None:
        """Count the whole step, if it has several micro-batches; to be called before the first one's forward.

        `forwards` runs them for training, in their order, as far as they may be held.
        """
        if len(self.batches) < 2:
            return
        if not balance.needs_forward:
            self.counted = dict.fromkeys(balance.routers, add_all([count_tokens(inputs) for inputs in self.batches]))
            return
        counted = []
        for inputs in self.batches:
            forward = next(forwards, None)
            if forward is None:
                routings = self.run_without_gradient(model, balance, inputs)
            else:
                self.held.append(forward)
                routings = forward.routings
            with torch.no_grad():
                counted.append(balance.count(balance.read(routings, inputs)))
        self.counted = {name: add_all([counts[name] for counts in counted]) for name in counted[0]}

    @torch.no_grad()
    def run_without_gradient(self, model: nn.Module, balance: Balance, inputs: dict) -> dict[str, Routing]:
        """Who is chosen in a micro-batch; keeps the random state that it began with."""
        weights = [parameter for router in balance.routers.values() for parameter in router.module.parameters()]
        self.states.append(RandomState(weights))
        with captured(balance.routers, balance.top_k) as routings, looking_ahead(balance.multi_token):
            model(**inputs | balance.light)
        return routings

    def begin_forward(self) -> Forward | None:
        """The next micro-batch's forward if it is held. Else a counted one gets the random state that it was counted
        with, so that it takes the same routes."""
        if self.held:
            return self.held.pop(0)
        if self.states:
            self.states.pop(0).restore()
        return None


def add_all(counts: list[Statistics]) -> Statistics:
    """Counts of several batches together."""
    return Statistics(*(torch.stack(parts).sum(dim=0) for parts in zip(*counts, strict=True)))
