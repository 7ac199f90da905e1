"""What an experiment is: a claim, arms that differ in one thing, and when the claim holds."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from .verdicts import Runs


@dataclass(frozen=True)
class Budget:
    """How much an arm is given: a model's fields, tokens, steps, and seeds."""

    fields: dict[str, Any]
    vocabulary: int
    length: int  # tokens of a row
    rows: int  # a step
    steps: int
    held_out: int  # rows
    seeds: int
    learning_rate: float

    @property
    def tokens(self) -> int:
        return self.length * self.rows * self.steps

    @property
    def dense(self) -> dict[str, Any]:
        """Fields of the model without experts that computes as much for a token: one MLP as wide as K experts."""
        width = self.fields["moe_intermediate_size"] * self.fields["num_experts_per_tok"]
        return {"mlp_layer_types": ["dense"] * self.fields["num_hidden_layers"], "intermediate_size": width}


SMALL = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.05, "tie_word_embeddings": True}
BUDGETS = {
    # Two cores, three minutes.
    "tiny": Budget(
        SMALL
        | {"hidden_size": 48, "num_hidden_layers": 2, "intermediate_size": 96, "moe_intermediate_size": 48}
        | {"num_experts": 8, "num_experts_per_tok": 2},
        vocabulary=512,
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
        vocabulary=4096,
        length=256,
        rows=32,
        steps=1200,
        held_out=256,
        seeds=3,
        learning_rate=3e-3,
    ),
}

# Fields of arms: the balance loss, and a selection bias instead.
BALANCED = {"router_aux_loss_coef": 0.01}
BIAS = {"router_args": {"selection_bias": True}, "router_bias_update_speed": 1e-3, "router_aux_loss_coef": 0.0}


@dataclass(frozen=True)
class Arm:
    """One way: fields of the configuration beside the budget's, and arguments of the trainer beside the runner's.

    begin: what is trained and on which text, of a trial (`trial.py`); else a model of random weights on the
    experiment's text.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    begin: Callable | None = None

    def said(self) -> dict[str, Any]:
        """In words of JSON."""
        begin = {} if self.begin is None else {"begin": called(self.begin)}
        return {"fields": self.fields, "arguments": self.arguments, **begin}


def called(function: Callable) -> str:
    """A function's name, with what is given to it."""
    if isinstance(function, partial):
        given = ", ".join(f"{name}={value!r}" for name, value in function.keywords.items())
        return f"{function.func.__name__}({given})"
    return function.__name__


@dataclass(frozen=True)
class Experiment:
    """claim and its source; `paper`: what the source shows for it; arms of a budget; `judge`: the verdict on what was
    measured; `equal`: what of the sizes must be the same for all arms, within 2%; `measure`: further numbers of a
    trained model, of a trial and the model; `says`: sentences on what was measured; `experts`: whether each expert's
    share of the tokens over training is drawn."""

    claim: str
    source: str
    paper: str
    arms: Callable[[Budget], dict[str, Arm]]
    judge: Callable[[Runs], str]
    equal: str | None = None
    measure: Callable | None = None
    says: Callable[[Runs], list[str]] = lambda runs: []
    experts: bool = False
