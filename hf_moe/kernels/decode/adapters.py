"""LoRA that is not merged: two small products beside a weight, whose factors a step reads where PEFT has them.

The first, A x, is a launch of its own; the second is added where the kernels sum a column. Sums are in float32, and
A x is rounded to A's type as PEFT has it. LoRA: https://arxiv.org/abs/2106.09685.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import nn

from ...stored_weights import full_name
from ..experts import hf_moe_experts_forward, obstacle, unusable
from ..low_rank import beside

LINEAR, EXPERTS = (f"peft.tuners.lora.layer.{name}" for name in ("Linear", "ParamWrapper"))  # it need not be installed


class Adapter(NamedTuple):
    """scaling B A beside a weight [out, in]: A [r, in] and B [out, r]; of experts [E, r, in] and [E, out, r]."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float


def active(layer: nn.Module) -> str | None:
    """The adapter that a layer of PEFT's adds; "" for none. None where it does something else than to add one."""
    if layer.merged:
        return None if layer.disable_adapters else ""
    names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) > 1 or any(name in layer.lora_variant or layer.lora_bias[name] for name in names):
        return None
    return names[0] if names else ""


def of_linear(layer: nn.Module) -> tuple[nn.Module, Adapter | None] | None:
    """A linear layer, and what PEFT adds to it; None where that is something else."""
    if full_name(type(layer)) != LINEAR:
        return layer, None
    name = active(layer)
    if name is None or layer.fan_in_fan_out:
        return None
    factors = name and Adapter(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
    return layer.base_layer, factors or None


def of_experts(layer: nn.Module) -> tuple[nn.Module, dict[str, Adapter]] | None:
    """Experts, and what PEFT adds to their weights, by name; None where that is something else."""
    found: dict[str, Adapter] = {}
    while full_name(type(layer)) == EXPERTS:
        name = active(layer)
        transposed = not layer._did_swap_in_out_features
        if name is None or layer.num_experts == 1 or transposed or layer.parameter_name in found:
            return None
        if name:
            a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
            a, b = a.view(layer.num_experts, -1, a.shape[1]), b.view(len(b), -1, layer.num_experts).permute(2, 0, 1)
            found[layer.parameter_name] = Adapter(a, b, layer.scaling[name])
        layer = layer.base_layer
    return layer, found


def of_many(routed: nn.Module, found: dict[str, Adapter]) -> Callable[..., torch.Tensor] | None:
    """[T, D] of x [T, D], index and weights [T, K] by the kernels of training, which add what `of_experts` found, too.

    None where these can't compute the experts.
    """
    weight = routed.down_proj
    if found and (obstacle(routed, weight.dtype) or unusable(weight.device.type)):
        return None

    def forward(x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        with ExitStack() as stack:
            for name, (a, b, scaling) in found.items():
                stack.enter_context(beside(routed, name, b, a, scaling))
            return hf_moe_experts_forward(routed, x, index, weights)

    return forward
