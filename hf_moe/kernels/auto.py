"""The experts implementation "auto": the fastest that can compute these experts here."""

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sonicmoe import ACT_MAP, is_sonicmoe_loadable
from transformers.utils import logging

from .experts import compute_dtype, fallback, obstacle, unusable
from .formula import formula
from .low_rank import given

logger = logging.get_logger(__name__)


def auto_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """sum_k weight_{t,k} FFN_{index_{t,k}}(x_t), [T, D], by the implementation that `fastest` names."""
    name = fastest(self, hidden_states)
    say(type(self).__name__, name)
    return ALL_EXPERTS_FUNCTIONS[name](self, hidden_states, top_k_index, top_k_weights)


def fastest(experts: nn.Module, hidden_states: torch.Tensor) -> str:
    """`sonicmoe` where it is installed and knows the experts, else our kernels, else Transformers'.

    Our kernels alone add an adapter's factors.
    """
    device, dtype = hidden_states.device.type, compute_dtype(experts, hidden_states)
    obstacles = obstacle(experts, dtype) or unusable(device)
    if obstacles is not None:
        return fallback(getattr(experts, "gate_up_proj" if experts.has_gate else "up_proj"), experts.down_proj)
    if given(experts):
        return "hf_moe"
    # SonicMoE computes in the weights' dtype, whatever autocast says.
    known = not formula(experts).clamped and experts.has_gate and experts.config.hidden_act in ACT_MAP
    known = known and hidden_states.dtype == dtype != torch.float32
    return "sonicmoe" if known and experts.down_proj.dtype == dtype and is_sonicmoe_loadable() else "hf_moe"


@torch._dynamo.assume_constant_result
def say(experts: str, name: str) -> None:
    logger.warning_once(f'The experts implementation "auto" computes {experts} by "{name}".')
