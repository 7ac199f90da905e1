"""The experts implementation "fp8": both products of an expert in FP8, and in the backward those with weights."""

import torch
from torch import nn

from ..experts import hf_moe_experts_forward, warn
from ..formula import formula
from ..low_rank import given, lowered, widened
from ..precision import computed_in
from . import eager, operators
from .format import BLOCK


def fp8_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """sum_k weight_{t,k} FFN_{index_{t,k}}(x_t): [T, D] from hidden_states [T, D], index and weights [T, K].

    An index of E or more adds nothing. What an adapter adds is not quantised. Experts that have an `obstacle` are
    computed by "hf_moe", and one warning says why.
    """
    reason = obstacle(self)
    if reason is not None:
        warn(f"in FP8 {reason}", "hf_moe")
        return hf_moe_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    name = "gate_up_proj" if self.has_gate else "up_proj"
    up = getattr(self, name)
    x = hidden_states.to(computed_in(hidden_states, up.dtype))
    of_up, of_down = given(self).get(name), given(self).get("down_proj")
    low, widen = (None, None) if of_up is None else (lowered(x, of_up), of_up.b.to(x.dtype))
    narrow = None if of_down is None else of_down.a.to(x.dtype)
    experts = operators.experts if operators.computes(x) else eager.Experts.apply
    output, narrowed = experts(x, top_k_index, top_k_weights, up, self.down_proj, low, widen, narrow, formula(self))
    if of_down is not None:
        output = output + widened(narrowed, top_k_index, of_down)
    return output.to(hidden_states.dtype)


def obstacle(experts: nn.Module) -> str | None:
    """Why these experts cannot be computed in FP8, or None."""
    if experts.has_bias:
        return "have no biases"
    if getattr(experts, "has_post_expert_norm", False):
        return "have no norm after an expert"
    found = formula(experts)
    if found is None:
        return "do not know what is computed between the products"
    if found.transposed or found.interleaved:
        return "have weights [E, out, in], all of gate first"
    return ragged(experts)


def ragged(experts: nn.Module) -> str | None:
    """What of their sizes is no multiple of 128, in words, or None."""
    sizes = zip(("hidden size", "inner size"), experts.down_proj.shape[1:], strict=True)
    wrong = [f"{name} {size}" for name, size in sizes if size % BLOCK]
    return f"have sizes that are multiples of {BLOCK}, not {' and '.join(wrong)}" if wrong else None
