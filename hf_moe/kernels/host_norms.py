"""Liger's RMS norm in Transformers' own models: one launch for each norm, where that computes what its module does.

Whether it does is tried on a few numbers, once for each class of module: families call their norms what they like, and
round at different places.
"""

from functools import partial
from inspect import signature
from types import MethodType

import torch
from torch import nn

# What Liger adds to a norm's weight, and where it rounds: before the weight, as Llama, or after it.
KINDS = ((0.0, "llama"), (1.0, "gemma"), (0.0, "gemma"))
EPSILON = ("variance_epsilon", "eps")


def fuse_norms(model: nn.Module) -> int:
    """Give the norms of `model` Liger's kernel, which must be installed; returns how many. The others stay."""
    kinds, fused = {}, 0
    for module in filter(may_be_norm, model.modules()):
        if type(module) not in kinds:
            kinds[type(module)] = kind_of(module)
        if kind := kinds[type(module)]:
            module.forward = MethodType(partial(forward, kind=kind), module)
            fused += 1
    return fused


def may_be_norm(module: nn.Module) -> bool:
    """Whether it has a weight alone, an epsilon, and a forward of hidden states alone."""
    if list(module._parameters) != ["weight"] or list(module.children()) or epsilon(module) is None:
        return False
    return len(signature(module.forward).parameters) == 1


def forward(self, hidden_states: torch.Tensor, kind: tuple[float, str]) -> torch.Tensor:
    """[..., D] of [..., D].

    By the module's own class where weight and states have two types, as under autocast: it returns the wider one.
    """
    if hidden_states.dtype != self.weight.dtype or not hidden_states.is_cuda:
        return type(self).forward(self, hidden_states)
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(hidden_states, self.weight, epsilon(self), *kind, False)


def epsilon(module: nn.Module) -> float | None:
    """What keeps a norm from dividing by zero; None of a module that has no such number."""
    return next((x for name in EPSILON if isinstance(x := getattr(module, name, None), float)), None)


@torch.no_grad()
def kind_of(module: nn.Module) -> tuple[float, str] | None:
    """Which of KINDS gives the same bits as the module's forward, on random numbers in float32 and bfloat16."""
    size = module.weight.numel()
    draw = torch.Generator("cpu").manual_seed(0)
    found = list(KINDS)
    for dtype in (torch.float32, torch.bfloat16):
        shapes = (size,), (5, size)  # on a CPU, whatever torch.set_default_device says
        weight, states = (torch.randn(*shape, generator=draw, device="cpu").to(dtype) for shape in shapes)
        said = with_weight(module, weight)(states)
        found = [kind for kind in found if is_equal(said, rms_norm(states, weight, epsilon(module), *kind))]
    return found[0] if found else None


def with_weight(module: nn.Module, weight: torch.Tensor) -> nn.Module:
    """The same module with another weight: its own may be on another device, or in shards."""
    other = object.__new__(type(module))
    other.__dict__ = module.__dict__ | {"_parameters": {"weight": nn.Parameter(weight, requires_grad=False)}}
    return other


def is_equal(said: object, expected: torch.Tensor) -> bool:
    return isinstance(said, torch.Tensor) and said.dtype == expected.dtype and torch.equal(said, expected)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float, offset: float, mode: str) -> torch.Tensor:
    """x / sqrt(mean(x^2) + epsilon) (weight + offset), in float32, rounded as `mode` says."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    if mode == "llama":
        return (weight + offset) * normed.to(x.dtype)
    return (normed * (weight.float() + offset)).to(x.dtype)
