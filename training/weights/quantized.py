"""The frozen weights under an adapter in 4 bits (QLoRA, https://arxiv.org/abs/2305.14314, 2) or 8, experts included.

bitsandbytes quantises `nn.Linear` modules as Transformers loads them, and skips the fused tensors of the experts
(https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1849). Under its parametrization for other parameters
PEFT 0.21 finds nothing to adapt, and torchao's NF4 has two dimensions at most; Transformers' block-FP8 experts need a
kernel from the Hub. Here every matrix, of two dimensions or three, becomes a tensor that is stored as NF4, or as
float8 in blocks, and is its own full size to whatever computes with it, so that modules, expert implementations and
PEFT stay as they are.
"""

import copy
from importlib.util import find_spec
from types import MethodType

import torch
from torch import nn

from hf_moe.model.unquantized import fused_in_full_precision
from hf_moe.stored_weights import FORMS, StoredWeight

from .groups import parts_of

BLOCK = 64  # numbers that share a scale; the scales are quantised in turn ("double quantisation")


class Nf4Weight(StoredWeight):
    """In NormalFloat-4: uint8, two numbers each, and bitsandbytes' QuantState."""

    stored = "nf4"

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> "Nf4Weight":
        from bitsandbytes.functional import quantize_4bit

        return cls(*quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=True))

    def values(self) -> torch.Tensor:
        """The numbers that the bits stand for."""
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


# How a frozen matrix is stored.
STORED = {"nf4": Nf4Weight} | FORMS


def check_quantization(stored: str) -> None:
    """Raises ValueError for what is no key of STORED, or where the package that packs and unpacks is missing."""
    if stored not in STORED:
        raise ValueError(f"lora_base is {stored!r}; it can be {', '.join(STORED)}.")
    if stored == "nf4" and find_spec("bitsandbytes") is None:
        raise ValueError("lora_base is nf4, which needs bitsandbytes: pip install 'hf_moe[qlora]'.")


@torch.no_grad()
def quantize(model: nn.Module, targets: dict[str, str], device: torch.device | None, stored: str = "nf4") -> str:
    """Store the weights in `targets` (name -> part) as `stored` on `device`, or where they are, one after the other;
    says what that did.

    Raises ValueError as `coverage`.
    """
    before = after = 0
    for name in targets:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        weight = module._parameters[attribute]
        packed = STORED[stored].quantize(weight.to(device or weight.device))
        before, after = before + weight.numel() * weight.element_size(), after + packed.bytes
        setattr(module, attribute, nn.Parameter(packed, requires_grad=False))
    model.save_pretrained = MethodType(save_values, model)
    return coverage(model, targets, before, after, stored)


def save_values(model: nn.Module, *args, **kwargs) -> None:
    """`model.save_pretrained`, which writes the values that stored weights compute with, in their dtype."""

    def to_values(module: nn.Module, weights: dict[str, torch.Tensor], *_) -> None:
        weights |= {name: x.values() for name, x in weights.items() if isinstance(x, StoredWeight)}

    hook = model.register_state_dict_post_hook(to_values)
    try:
        type(model).save_pretrained(model, *args, **kwargs)
    finally:
        hook.remove()


def quantize_experts(model: nn.Module, stored: str = "nf4") -> str:
    """Store the experts that a quantization config has left in full precision, where they lie; says what that did.

    In memory alone: what `save_pretrained` writes are the values that they compute with, as large as before. Raises
    ValueError without such experts, for what is no key of STORED, or where the package that packs is missing.
    """
    check_quantization(stored)
    left = fused_in_full_precision(model)
    if not left:
        raise ValueError(f"{type(model).__name__} has no expert in full precision: there is nothing to quantise.")
    parts = parts_of(model)
    return quantize(model, {name: parts[name] for name in left}, None, stored)


def coverage(model: nn.Module, targets: dict[str, str], before: int, after: int, stored: str = "nf4") -> str:
    """What is stored in fewer bits, in words. Raises ValueError unless it is `targets` and nothing else."""
    parts = parts_of(model)
    found = {name: parts[name] for name, x in model.named_parameters() if isinstance(x, STORED[stored])}
    if found != targets:
        wrong = sorted(found.items() ^ targets.items())
        raise ValueError(f"{len(wrong)} weights are stored in another way than was asked, first {wrong[0][0]}.")
    counts = {part: list(found.values()).count(part) for part in found.values()}
    parts = ", ".join(f"{count} matrices of {part}" for part, count in counts.items())
    count = sum(model.get_parameter(name).numel() for name in found)
    whole = sum(x.numel() for x in model.parameters())
    return (
        f"{stored} for {parts}: {count:,} of {whole:,} parameters ({count / whole:.2%}) in {after / 2**20:,.1f} MiB "
        f"instead of {before / 2**20:,.1f}"
    )


@torch.no_grad()
def dequantize(model: nn.Module) -> None:
    """Make every weight of `model` a plain one in float32: the values that an adapter was trained beside."""
    for name, weight in list(model.named_parameters()):
        if isinstance(weight, StoredWeight):
            path, _, attribute = name.rpartition(".")
            values = nn.Parameter(weight.values().float(), requires_grad=False)
            setattr(model.get_submodule(path), attribute, values)
