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
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from hf_moe.model.unquantized import fused_in_full_precision

from .groups import parts_of

BLOCK = 64  # numbers that share a scale; the scales are quantised in turn ("double quantisation")
FP8, FP8_BLOCK = torch.float8_e4m3fn, 128
aten = torch.ops.aten


class StoredWeight(torch.Tensor):
    """A matrix [out, in], or one for each expert [E, out, in], stored in fewer bits: `packed`, and its `state`.

    Every operation but a copy is that of its values in `dtype`, which live as long as the operation needs them. What
    multiplies by the whole tensor keeps its bits for the backward pass, what works with a piece of it that piece.
    """

    @staticmethod
    def __new__(cls, packed: torch.Tensor, state):
        return torch.Tensor._make_wrapper_subclass(cls, state.shape, dtype=state.dtype, device=packed.device)

    def __init__(self, packed: torch.Tensor, state):
        self.packed, self.state = packed, state

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.shape)}, dtype={self.dtype}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            return cls(args[0].packed, args[0].state)
        if func is aten._to_copy.default and kwargs.get("dtype") in (None, args[0].dtype):
            return args[0].moved(kwargs.get("device") or args[0].device)
        mutable = func._schema.is_mutable and func is not aten.set_.source_Tensor  # with itself, by a parametrization
        if mutable and isinstance(args[0], cls):
            raise ValueError(
                f"A weight that is stored as {args[0].stored} cannot be changed in place ({func}), as a merge of an "
                "adapter does: call hf_moe.training.weights.quantized.dequantize(model) before."
            )
        args, kwargs = tree_map_only(cls, cls.values, (args, kwargs))
        return func(*args, **kwargs)


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


class Fp8State(NamedTuple):
    """What a block-FP8 weight is beside its codes: scales [..., ceil(out / 128), ceil(in / 128)] in float32."""

    scales: torch.Tensor
    shape: torch.Size
    dtype: torch.dtype


class Fp8Weight(StoredWeight):
    """In float8 e4m3, by blocks of 128 x 128 as DeepSeek-V3 is released (https://arxiv.org/abs/2412.19437, 3.3.2).

    A weight that came from such a release gets the codes of the release again: its largest number in a block is the
    largest code times the scale.
    """

    stored = "fp8"

    @classmethod
    def quantize(cls, weight: torch.Tensor) -> "Fp8Weight":
        shape, numbers = weight.shape, weight.float()
        numbers = nn.functional.pad(numbers, (0, -shape[-1] % FP8_BLOCK, 0, -shape[-2] % FP8_BLOCK))
        blocks = numbers.unflatten(-1, (-1, FP8_BLOCK)).unflatten(
            -3, (-1, FP8_BLOCK)
        )  # [..., rows, 128, columns, 128]
        scales = blocks.abs().amax(dim=(-3, -1), keepdim=True) / torch.finfo(FP8).max
        codes = (blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)).to(FP8)
        codes = codes.flatten(-4, -3).flatten(-2)[..., : shape[-2], : shape[-1]].contiguous()
        return cls(codes, Fp8State(scales.squeeze(-1).squeeze(-2), shape, weight.dtype))

    def values(self) -> torch.Tensor:
        rows, columns = self.shape[-2:]
        scales = self.state.scales.repeat_interleave(FP8_BLOCK, dim=-2)[..., :rows, :]
        scales = scales.repeat_interleave(FP8_BLOCK, dim=-1)[..., :columns]
        return (self.packed.float() * scales).to(self.dtype)

    def moved(self, device: torch.device) -> "Fp8Weight":
        return type(self)(self.packed.to(device), self.state._replace(scales=self.state.scales.to(device)))

    @property
    def bytes(self) -> int:
        return self.packed.numel() + 4 * self.state.scales.numel()


# How a frozen matrix is stored.
STORED = {kind.stored: kind for kind in (Nf4Weight, Fp8Weight)}


def check_quantization(stored: str) -> None:
    """Raises ValueError for what is no key of STORED, or where the package that packs and unpacks is missing."""
    if stored not in STORED:
        raise ValueError(f"lora_base is {stored!r}; it can be {' or '.join(STORED)}.")
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
