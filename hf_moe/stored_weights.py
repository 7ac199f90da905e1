"""Matrices that are stored in fewer bits and are their own full size to whatever computes with them.

Modules, expert implementations and PEFT stay as they are: any operation gets the values in full, which live as long as
it needs them. Kernels that know a form read its codes instead (hf_moe/kernels/decode/stored.py).
"""

import copy
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

FP8 = torch.float8_e4m3fn
aten = torch.ops.aten


class StoredWeight(torch.Tensor):
    """A matrix [out, in], or one for each expert [E, out, in], stored in fewer bits: `packed`, and its `state`.

    Every operation but a copy is that of its values in `dtype`, which live as long as the operation needs them. What
    multiplies by the whole tensor keeps its bits for the backward pass, what works with a piece of it that piece.
    """

    stored: ClassVar[str]

    @staticmethod
    def __new__(cls, packed: torch.Tensor, state):
        return torch.Tensor._make_wrapper_subclass(cls, state.shape, dtype=state.dtype, device=packed.device)

    def __init__(self, packed: torch.Tensor, state):
        self.packed, self.state = packed, state

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo: dict) -> "StoredWeight":
        copied = type(self)(copy.deepcopy(self.packed, memo), copy.deepcopy(self.state, memo))
        copied = nn.Parameter(copied, requires_grad=False) if isinstance(self, nn.Parameter) else copied
        memo[id(self)] = copied
        return copied

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
        with torch.inference_mode(False):  # views of a weight made outside are no inference tensors
            args, kwargs = tree_map_only(cls, cls.values, (args, kwargs))
        return func(*args, **kwargs)


class State(NamedTuple):
    """What the codes are multiplied by, a number for each block of so many rows and columns, and what is added then.

    scales and lows [..., ceil(out / rows), ceil(in / columns)]; shape and dtype are those of the values.
    """

    scales: torch.Tensor
    lows: torch.Tensor | None
    block: tuple[int, int]
    shape: torch.Size
    dtype: torch.dtype


class BlockWeight(StoredWeight):
    """Codes times their block's scale, plus its low: what kernels can read as it is."""

    # By both, PyTorch knows that to move one is to move its parts.
    def __tensor_flatten__(self):
        names = ["scales"] if self.state.lows is None else ["scales", "lows"]
        return ["packed", *names], (self.state.block, self.state.shape, self.state.dtype)

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, torch.Tensor], rest, size=None, stride=None) -> "BlockWeight":
        return cls(parts["packed"], State(parts["scales"], parts.get("lows"), *rest))

    @property
    def scales(self) -> torch.Tensor:
        return self.state.scales

    @property
    def lows(self) -> torch.Tensor | None:
        return self.state.lows

    def codes(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """[..., out, in], in a tensor of their own; exact in any dtype that a weight may have."""
        raise NotImplementedError

    @torch.no_grad()  # into what is here already
    def values(self) -> torch.Tensor:
        """The numbers that the bits stand for: computed in float32, and rounded once."""
        (rows, columns), shape = self.state.block, self.state.shape
        if shape[-2] % rows or shape[-1] % columns:
            numbers = self.codes() * spread(self.scales, self.state.block, shape)
            if self.lows is not None:
                numbers += spread(self.lows, self.state.block, shape)
            return numbers.to(self.dtype)
        # Nothing but the codes is as large as the weight, and they become the values where they are.
        numbers = self.codes(self.dtype)
        blocks = numbers.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
        scales = self.scales[..., :, None, :, None]
        if self.lows is None:
            torch.mul(blocks, scales, out=blocks)
        else:  # a code of 4 bits times a scale in bfloat16 is exact, so that it is as if the sum alone were rounded
            torch.addcmul(self.lows[..., :, None, :, None], blocks, scales, out=blocks)
        return numbers

    def moved(self, device: torch.device) -> "BlockWeight":
        lows = None if self.lows is None else self.lows.to(device)
        return type(self)(self.packed.to(device), self.state._replace(scales=self.scales.to(device), lows=lows))

    @property
    def bytes(self) -> int:
        """What it takes in memory, scales included."""
        return sum(x.nbytes for x in (self.packed, self.scales, self.lows) if x is not None)


class Fp8Weight(BlockWeight):
    """In float8 e4m3, by blocks of 128 x 128 as DeepSeek-V3 is released (https://arxiv.org/abs/2412.19437, 3.3.2).

    A weight that came from such a release gets the codes of the release again: its largest number in a block is the
    largest code times the scale.
    """

    stored = "fp8"

    @classmethod
    def quantize(cls, weight: torch.Tensor, block: tuple[int, int] = (128, 128)) -> "Fp8Weight":
        blocks = blocks_of(weight, block)
        scales = blocks.abs().amax(dim=(-3, -1), keepdim=True) / torch.finfo(FP8).max
        codes = (blocks / scales.clamp_min(torch.finfo(torch.float32).tiny)).to(FP8)
        state = State(scales.squeeze(-1).squeeze(-2), None, block, weight.shape, weight.dtype)
        return cls(whole_of(codes, weight.shape), state)

    def codes(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.packed.to(dtype)


class Int4Weight(BlockWeight):
    """In 4 bits: of 128 numbers that follow each other in a row the least is 0 and the largest 15.

    Scales and lows are in bfloat16, and the codes found from these. Two codes a byte, in the order in which kernels
    read them (hf_moe/kernels/decode/stored.py): rows are filled up to whole runs of 32, and for m = 0 ... 7 a run's
    bytes 2 m and 2 m + 1 have, from their lower halves on, its columns m, m + 8, m + 16 and m + 24.
    """

    stored = "int4"

    @classmethod
    def quantize(cls, weight: torch.Tensor, block: tuple[int, int] = (1, 128)) -> "Int4Weight":
        blocks = blocks_of(weight, block)
        # What fills up the last block lies within its numbers.
        real = blocks_of(torch.ones_like(weight, dtype=torch.bool), block).bool()
        least = blocks.masked_fill(~real, torch.inf).amin(dim=(-3, -1), keepdim=True).bfloat16().float()
        largest = blocks.masked_fill(~real, -torch.inf).amax(dim=(-3, -1), keepdim=True)
        scales = ((largest - least) / 15).bfloat16().float()
        codes = ((blocks - least) / scales.clamp_min(torch.finfo(torch.float32).tiny)).round().clamp(0, 15)
        codes = whole_of(codes.to(torch.uint8), weight.shape)
        lower, higher = nn.functional.pad(codes, (0, -codes.shape[-1] % 32)).unflatten(-1, (-1, 2, 2, 8)).unbind(-2)
        packed = (lower | higher << 4).mT.flatten(-3)
        scales, lows = (x.squeeze(-1).squeeze(-2).bfloat16() for x in (scales, least))
        return cls(packed, State(scales, lows, block, weight.shape, weight.dtype))

    def codes(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        pairs = self.packed.unflatten(-1, (-1, 8, 2)).mT
        runs = pairs.new_empty(*pairs.shape[:-1], 2, 8, dtype=dtype)
        lower, upper = runs[..., 0, :], runs[..., 1, :]
        lower.copy_(pairs)  # in one type from here on, since CUDA computes no integers into another
        torch.div(lower, 16, rounding_mode="floor", out=upper)
        lower.sub_(upper, alpha=16)
        return runs.flatten(-4)[..., : self.shape[-1]].contiguous()


def blocks_of(weight: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[..., out / rows, rows, in / columns, columns] in float32, filled up with zeros."""
    rows, columns = block
    padded = nn.functional.pad(weight.float(), (0, -weight.shape[-1] % columns, 0, -weight.shape[-2] % rows))
    return padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))


def whole_of(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    return blocks.flatten(-4, -3).flatten(-2)[..., : shape[-2], : shape[-1]].contiguous()


def full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def spread(numbers: torch.Tensor, block: tuple[int, int], shape: torch.Size) -> torch.Tensor:
    """[..., out, in] in float32: each block's number for all of it."""
    numbers = numbers.float().repeat_interleave(block[0], dim=-2)[..., : shape[-2], :]
    return numbers.repeat_interleave(block[1], dim=-1)[..., : shape[-1]]


FORMS = {kind.stored: kind for kind in (Fp8Weight, Int4Weight)}
TORCHAO = "torchao.quantization.Float8Tensor"
# Classes of parameters whose codes kernels read, by their full names since not all need be installed.
READ = {full_name(kind) for kind in FORMS.values()} | {TORCHAO}


def in_full(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a parameter whose codes something else doesn't read."""
    name = full_name(type(tensor))
    return tensor.dequantize() if name == TORCHAO else tensor.values() if name in READ else tensor
