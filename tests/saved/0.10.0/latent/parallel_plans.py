"""What tensor and expert parallelism cut of feed-forward networks and sparse blocks, by names within them.

Styles are Transformers'.
"""

import re

from torch import nn


def mlp_tp_plan(gated: bool) -> dict[str, str]:
    return ({"gate_proj": "colwise"} if gated else {}) | {"up_proj": "colwise", "down_proj": "rowwise"}


def block_tp_plan(gated: bool, cut: bool, shared: bool) -> dict[str, str]:
    """Of a sparse block, its routed experts cut or whole, and with shared experts or without."""
    plan = {}
    if cut:
        experts = {"gate_up_proj": "packed_colwise"} if gated else {"up_proj": "colwise"}
        plan = {f"experts.{name}": style for name, style in (experts | {"down_proj": "rowwise"}).items()}
        plan["experts"] = "moe_tp_experts"
    if shared:
        plan |= {f"shared_experts.{name}": style for name, style in mlp_tp_plan(gated).items()}
    return plan


def block_ep_plan(gated: bool, bias: bool) -> dict[str, str]:
    """Whole experts on each rank, tokens dispatched to them."""
    names = ["gate_up_proj" if gated else "up_proj", "down_proj"]
    if bias:
        names += [f"{name}_bias" for name in names]
    return {f"experts.{name}": "grouped_gemm" for name in names} | {"experts": "ep_dispatch_experts"}


def in_all_layers(name: str) -> str:
    """A name as plans have it: with a star for numbers."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def within(path: str, plan: dict[str, str]) -> dict[str, str]:
    return {f"{path}.{name}": style for name, style in plan.items()}


def standing(plan: dict[str, str], model: nn.Module) -> dict[str, str]:
    """The rules of what the model has: any other draws a warning."""
    names = {in_all_layers(name) for name, _ in [*model.named_modules(), *model.named_parameters()]}
    return {name: style for name, style in plan.items() if name in names}
