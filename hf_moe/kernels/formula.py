"""What an expert computes between its two products, found out by numbers: its own code is tried on a few values."""

from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import NamedTuple

import torch
from packaging.version import parse
from torch import nn
from torch.nn import functional as F

# What the kernels call them -> what they are.
ACTIVATIONS = {
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "linear": lambda x: x,
}
HUGE, SMALL = 1e4, 0.01  # beyond any limit, and within
PLACES = (-HUGE, -30.0, -8.0, -3.0, -1.5, -0.7, -0.1, 0.0, SMALL, 0.2, 0.6, 1.0, 1.9, 3.3, 6.5, 8.0, 12.0, 30.0, HUGE)


class Formula(NamedTuple):
    """act(gate) * up, act(up) where experts are not `gated`; with a `limit` L it is act(gate') * (up' + shift), gate'
    at most L and up' within -L and L (gpt-oss, DeepSeek-V4).

    `transposed`: weights are [E, in, out]. `interleaved`: gate and up take turns; else all of gate comes first.
    """

    activation: str
    gated: bool = True
    transposed: bool = False
    interleaved: bool = False
    limit: float | None = None
    shift: float = 0.0

    @property
    def clamped(self) -> bool:
        return self.limit is not None or self.shift != 0


# torch 2.11's compiler makes no constant of a module; there, a module must have been tried before it is compiled.
COMPILES = parse(version("torch")) >= parse("2.12")


def formula(experts: nn.Module) -> Formula | None:
    """That of a module of experts; None where it is none that the kernels know. Tried once."""
    if hasattr(experts, "hf_moe_formula"):
        return experts.hf_moe_formula
    if torch.compiler.is_dynamo_compiling():
        return tried(experts)
    experts.hf_moe_formula = found = tried(experts)
    return found


def unseen(experts: nn.Module) -> bool:
    """Whether the compiler is at experts whose formula it cannot find out."""
    return not COMPILES and torch.compiler.is_dynamo_compiling() and not hasattr(experts, "hf_moe_formula")


@torch._dynamo.assume_constant_result
@torch.no_grad()
def tried(experts: nn.Module) -> Formula | None:
    return gated(experts) if experts.has_gate else plain(experts)


def plain(experts: nn.Module) -> Formula | None:
    name = activation(experts.act_fn)
    return name and Formula(name, gated=False, transposed=experts.is_transposed)


def activation(function: Callable[[torch.Tensor], torch.Tensor]) -> str | None:
    """The kernels' name for an activation, None where they have none that equals it."""
    places = torch.tensor(PLACES, dtype=torch.float64)
    answer = function(places).double()
    return next((name for name, act in ACTIVATIONS.items() if equal(act(places), answer)), None)


def gated(experts: nn.Module) -> Formula | None:
    """With up at 0, a small value and a huge one, the answers name shift and limit; then all must agree."""
    places = torch.tensor(PLACES, dtype=torch.float64)
    gate, up = places.expand(len(places), -1), places[:, None].expand(-1, len(places))
    for interleaved in (False, True):
        halves = torch.stack([gate, up], dim=-1) if interleaved else torch.stack([gate, up], dim=1)
        answer = experts._apply_gate(halves.flatten(1)).double()
        at_zero, at_small, at_huge = (answer[PLACES.index(x), PLACES.index(SMALL)].item() for x in (0.0, SMALL, HUGE))
        value = (at_small - at_zero) / SMALL
        if value == 0:
            continue
        shift, most = round(at_zero / value, 4), round((at_huge - at_zero) / value, 4)
        limit = None if most > HUGE / 2 else most
        least, highest = (-HUGE, HUGE) if limit is None else (-limit, limit)
        factor = up.clamp(least, highest) + shift
        for name, act in ACTIVATIONS.items():
            if equal(act(gate.clamp(max=highest)) * factor, answer):
                return Formula(name, True, experts.is_transposed, interleaved, limit, shift)
    return None


def equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """As far as float32 tells, in which some compute."""
    return torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
