"""The experts implementation "hf_moe": what the kernels can compute they compute, Transformers the rest."""

from functools import partial
from importlib.util import find_spec

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.utils import logging

from ..model.grouped import takes_rows
from ..stored_weights import in_full
from .copies import cast
from .formula import formula, unseen
from .low_rank import given, lowered, widened
from .operators import experts as experts_operator
from .precision import computed_in

logger = logging.get_logger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OURS = ("hf_moe", "auto", "fp8")  # implementations that compute by these kernels, or in their place


def hf_moe_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """sum_k weight_{t,k} FFN_{index_{t,k}}(x_t): [T, D] from hidden_states [T, D], index and weights [T, K].

    An index of E or more ("on another rank", or dropped) adds nothing. Computed in the experts' dtype, or in
    autocast's; sums over a token's experts are in float32. Where the kernels do not apply, one warning says why, and
    what computes instead.
    """
    name = "gate_up_proj" if self.has_gate else "up_proj"
    up, down, dtype = in_full(getattr(self, name)), in_full(self.down_proj), compute_dtype(self, hidden_states)
    reason = obstacle(self, dtype) or unusable(hidden_states.device.type)
    if reason is not None:
        assert not given(self), "only these kernels add what an adapter gave"
        other = fallback(up, down)
        warn(reason, other)
        return ALL_EXPERTS_FUNCTIONS[other](self, hidden_states, top_k_index, top_k_weights)
    up_bias, down_bias = (getattr(self, f"{name}_bias"), self.down_proj_bias) if self.has_bias else (None, None)
    operands = [cast(tensor, dtype) for tensor in (up, down, up_bias, down_bias)]
    x = hidden_states.to(dtype)
    of_up, of_down = given(self).get(name), given(self).get("down_proj")
    operands += (None, None) if of_up is None else (lowered(x, of_up), of_up.b.to(dtype))
    operands.append(None if of_down is None else of_down.a.to(dtype))
    save = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (x, top_k_weights, *operands)
    )
    beside = None if of_down is None else partial(widened, index=top_k_index, factors=of_down)
    output = experts_operator(x, top_k_index, top_k_weights, *operands, *formula(self), save, beside=beside)
    return output.to(hidden_states.dtype)


def compute_dtype(experts: nn.Module, hidden_states: torch.Tensor) -> torch.dtype:
    """Autocast's where that is on, else the experts' own."""
    return computed_in(hidden_states, experts.down_proj.dtype)


def adds_low_rank(experts: nn.Module) -> bool:
    """Whether these kernels compute the experts where they are, and can add what an adapter gives."""
    if not hasattr(experts, "has_gate"):
        return False
    if experts.config._experts_implementation == "fp8":  # by its definition, where not by kernels
        return True
    weight = experts.down_proj
    return computes(experts, compute_dtype(experts, weight), weight.device.type)


def computes(experts: nn.Module, dtype: torch.dtype, device: str) -> bool:
    """Whether these kernels are what computes the experts on this kind of device."""
    named = experts.config._experts_implementation in OURS
    return named and obstacle(experts, dtype) is None and unusable(device) is None


def autocasts(experts: nn.Module, dtype: torch.dtype, device: str) -> bool:
    """Whether autocast to `dtype` casts the experts' weights; Transformers' grouped_mm computes in what they are."""
    if not hasattr(experts, "has_gate"):
        return False
    return experts.config._experts_implementation in ("eager", "batched_mm") or computes(experts, dtype, device)


def obstacle(experts: nn.Module, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot compute these experts, or None."""
    if dtype not in DTYPES:
        return f"compute in float32, bfloat16 and float16, not in {dtype}"
    if experts.has_post_expert_norm:
        return "have no norm after an expert"
    if unseen(experts):
        return "must see experts once before torch 2.11 compiles them: call the model once, or take torch 2.12"
    if formula(experts) is None:
        name, act = type(experts).__name__, type(experts.act_fn).__name__
        return f"do not know what {name} computes between its products ({act})"
    return None


@torch._dynamo.assume_constant_result
def unusable(device: str) -> str | None:
    """Why Triton cannot run on this kind of device, or None."""
    if find_spec("triton") is None:
        return "need Triton: pip install 'hf_moe[kernels]'"
    if device == "cpu":
        from triton import knobs

        return None if knobs.runtime.interpret else "run on a GPU, not on a CPU"
    if device == "cuda" and torch.version.cuda and torch.cuda.get_device_capability() < (8, 0):
        return f"need an Ampere card or newer, not {torch.cuda.get_device_name()}"
    return None


def fallback(*weights: torch.Tensor) -> str:
    """Transformers' implementation for these weights [E, out, in]: "grouped_mm", or where that raises "batched_mm"."""
    grouped = all(
        weight.dtype in DTYPES and all(takes_rows(size, weight.dtype) for size in weight.shape[1:])
        for weight in weights
    )
    return "grouped_mm" if grouped else "batched_mm"


@torch._dynamo.assume_constant_result
def warn(reason: str, other: str) -> None:
    logger.warning_once(f'The experts implementation "hf_moe" falls back to "{other}": its kernels {reason}.')
