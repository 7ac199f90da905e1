"""What an experiment is: a claim, arms that differ in one thing, and when the claim holds."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

HOLDS, DOES_NOT, UNDECIDED = "holds", "does not hold here", "undecided at this size"


@dataclass(frozen=True)
class Budget:
    """How much an arm is given: a model's fields, tokens, steps, and seeds."""

    fields: dict[str, Any]
    length: int  # tokens of a row
    rows: int  # a step
    steps: int
    held_out: int  # rows
    seeds: int
    learning_rate: float

    @property
    def tokens(self) -> int:
        return self.length * self.rows * self.steps


SMALL = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.05, "tie_word_embeddings": True}
BUDGETS = {
    # Two cores, three minutes.
    "tiny": Budget(
        SMALL
        | {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "moe_intermediate_size": 48}
        | {"num_experts": 8, "num_experts_per_tok": 2},
        length=64,
        rows=16,
        steps=80,
        held_out=64,
        seeds=2,
        learning_rate=5e-3,
    ),
    # One card, ten minutes.
    "gpu": Budget(
        SMALL
        | {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512, "moe_intermediate_size": 256}
        | {"num_experts": 16, "num_experts_per_tok": 2},
        length=256,
        rows=64,
        steps=600,
        held_out=256,
        seeds=3,
        learning_rate=2e-3,
    ),
}

# Fields of arms: the balance loss, and a selection bias instead.
BALANCED = {"router_aux_loss_coef": 0.01}
BIAS = {"router_args": {"selection_bias": True}, "router_bias_update_speed": 1e-3, "router_aux_loss_coef": 0.0}


@dataclass(frozen=True)
class Arm:
    """One way: fields of the configuration beside the budget's, and arguments of the trainer beside the runner's."""

    fields: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)


Runs = dict[str, list[dict[str, Any]]]  # arm -> what each seed measured


@dataclass(frozen=True)
class Experiment:
    """claim and its source; `paper`: what the source shows for it; arms of a budget; `equal`: what of the sizes must
    be the same for all arms, within 2%; `judge`: the verdict on what was measured."""

    claim: str
    source: str
    paper: str
    arms: Callable[[Budget], dict[str, Arm]]
    judge: Callable[[Runs], str]
    equal: str | None = None


def mean(runs: list[dict[str, Any]], name: str) -> float:
    return sum(run[name] for run in runs) / len(runs)


def spread(runs: list[dict[str, Any]], name: str) -> float:
    """Standard deviation over the seeds, 0 of one."""
    centre = mean(runs, name)
    return math.sqrt(sum((run[name] - centre) ** 2 for run in runs) / max(len(runs) - 1, 1))


def lower(runs: Runs, arm: str, other: str, name: str = "held_out_loss") -> str:
    """Whether `arm` is lower than `other`: seed by seed, by more than twice the standard error of the difference.

    With fewer than three seeds that error is unknown, and all of them have to agree by 1% at least.
    """
    pairs = list(zip(runs[arm], runs[other], strict=True))
    differences = [one[name] - two[name] for one, two in pairs]
    centre = sum(differences) / len(differences)
    if len(differences) < 3:
        least = 0.01 * mean(runs[other], name)
        clear = all(x * centre > 0 and abs(x) > least for x in differences)
    else:
        error = spread([{"x": x} for x in differences], "x") / math.sqrt(len(differences))
        clear = abs(centre) > 2 * error
    return UNDECIDED if not clear else HOLDS if centre < 0 else DOES_NOT


def both(*verdicts: str) -> str:
    """Of several that have to hold together."""
    if all(x == HOLDS for x in verdicts):
        return HOLDS
    return DOES_NOT if DOES_NOT in verdicts else UNDECIDED
