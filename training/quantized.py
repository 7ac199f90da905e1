"""The frozen weights under an adapter in 4 bits (QLoRA, https://arxiv.org/abs/2305.14314, 2), routed experts included.

bitsandbytes quantises `nn.Linear` modules as Transformers loads them, and skips the fused tensors of the experts
(https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1849). Under its parametrization for other parameters
PEFT 0.21 finds nothing to adapt, and torchao's NF4 has two dimensions at most. Here every matrix, of two dimensions or
three, becomes a tensor that is stored as NF4 and is its own full size to whatever computes with it, so that modules,
expert implementations and PEFT stay as they are.
"""

import copy
from importlib.util import find_spec

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from .parameter_groups import part_of

BLOCK = 64  # numbers that share a scale; the scales are quantised in turn ("double quantisation")
aten = torch.ops.aten


class Nf4Weight(torch.Tensor):
    """A matrix [out, in], or one for each expert [E, out, in], in NormalFloat-4.

    Every operation but a copy is that of its values in `dtype`, which live as long as the operation needs them. What
    multiplies by the whole tensor keeps 4 bits of it for the backward pass, what works with a piece of it that piece.
    """

    @staticmethod
    def __new__(cls, packed: torch.Tensor, state):
        return torch.Tensor._make_wrapper_subclass(cls, state.shape, dtype=state.dtype, device=packed.device)

    def __init__(self, packed: torch.Tensor, state):
        self.packed, self.state = packed, state  # uint8, and bitsandbytes' QuantState

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> "Nf4Weight":
        from bitsandbytes.functional import quantize_4bit

        return cls(*quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=True))

    def values(self) -> torch.Tensor:
        """The numbers that the 4 bits stand for."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.packed, self.state)

    def moved(self, device: torch.device) -> "Nf4Weight":
        state = copy.deepcopy(self.state)
        state.to(device)
        return type(self)(self.packed.to(device), state)

    @property
    def bytes(self) -> int:
        """What it takes in memory, scales included."""
        parts = [self.packed, self.state.absmax, self.state.state2.absmax]
        return sum(x.numel() * x.element_size() for x in parts)

    def __repr__(self) -> str:
        return f"Nf4Weight({list(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            return cls(args[0].packed, args[0].state)
        if func is aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype):
            return args[0].moved(kwargs.get("device") or args[0].device)
        args, kwargs = tree_map_only(cls, cls.values, (args, kwargs))
        return func(*args, **kwargs)


def check_quantization() -> None:
    """Raises ValueError where the package that packs and unpacks is missing."""
    if find_spec("bitsandbytes") is None:
        raise ValueError("lora_base is nf4, which needs bitsandbytes: pip install 'hf_moe[qlora]'.")


@torch.no_grad()
def quantize(model: nn.Module, targets: dict[str, str], device: torch.device) -> str:
    """Put the weights in `targets` (name -> part) into 4 bits on `device`, one after the other; returns what that did.

    Raises ValueError as `coverage`.
    """
    before = after = 0
    for name in targets:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        weight = module._parameters[attribute]
        packed = Nf4Weight.quantize(weight.to(device))
        before, after = before + weight.numel() * weight.element_size(), after + packed.bytes
        setattr(module, attribute, nn.Parameter(packed, requires_grad=False))
    return coverage(model, targets, before, after)


def coverage(model: nn.Module, targets: dict[str, str], before: int, after: int) -> str:
    """What is stored in 4 bits, in words. Raises ValueError unless it is `targets` and nothing else."""
    found = {name: part_of(name) for name, x in model.named_parameters() if isinstance(x, Nf4Weight)}
    if found != targets:
        wrong = sorted(found.items() ^ targets.items())
        raise ValueError(f"{len(wrong)} weights are stored in another way than was asked, first {wrong[0][0]}.")
    counts = {part: list(found.values()).count(part) for part in found.values()}
    parts = ", ".join(f"{count} matrices of {part}" for part, count in counts.items())
    count = sum(model.get_parameter(name).numel() for name in found)
    whole = sum(x.numel() for x in model.parameters())
    return (
        f"4 bits for {parts}: {count:,} of {whole:,} parameters ({count / whole:.2%}) in {after / 2**20:,.1f} MiB "
        f"instead of {before / 2**20:,.1f}"
    )


@torch.no_grad()
def dequantize(model: nn.Module) -> None:
    """Make every weight of `model` a plain one in float32: the values that an adapter was trained beside."""
    for name, weight in list(model.named_parameters()):
        if isinstance(weight, Nf4Weight):
            path, _, attribute = name.rpartition(".")
            values = nn.Parameter(weight.values().float(), requires_grad=False)
            setattr(model.get_submodule(path), attribute, values)
