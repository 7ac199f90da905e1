"""Weights as the kernels of a step read them: plain, or stored in 8 or 4 bits with a scale for each block.

A form is 0 where the values are stored, 1 for float8 e4m3, 2 for two 4-bit codes a byte. Of a form that is not 0, a
value is its code times its block's scale, plus the block's low if there are lows. Products use the codes, which are
small numbers and exact, and multiply their sums with the scales.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...stored_weights import TORCHAO, Fp8Weight, Int4Weight, full_name

RUN = 16  # bytes that a thread reads at once: of a run, products are summed before they meet the scale
BYTES = tl.constexpr(RUN)
WHOLE = 2**30  # columns of a block that has all


class Weight(NamedTuple):
    """A matrix [..., out, in] as it is stored; `block` has the rows and columns that share a scale."""

    codes: torch.Tensor
    scales: torch.Tensor | None
    lows: torch.Tensor | None
    shape: tuple[int, ...]
    form: int
    block: tuple[int, int]

    @property
    def pointers(self) -> tuple[torch.Tensor, ...]:
        """Codes, scales and lows; what is missing is not read."""
        scales = self.codes if self.scales is None else self.scales
        return self.codes, scales, scales if self.lows is None else self.lows

    @property
    def strides(self) -> tuple[int, int]:
        """From one matrix to the next: of codes, and of scales."""
        return self.codes.stride(0), 0 if self.scales is None else self.scales.stride(0)

    def like(self, shape: tuple[int, ...], *parts: torch.Tensor | None) -> "Weight":
        return Weight(*parts, shape, self.form, self.block)

    def unsqueeze(self) -> "Weight":
        """One matrix as a stack of one."""
        parts = (None if x is None else x.unsqueeze(0) for x in (self.codes, self.scales, self.lows))
        return self.like((1, *self.shape), *parts)

    def halves(self) -> tuple["Weight", "Weight"]:
        """The first and the second half of all rows of [E, out, in]."""
        parts = [(None, None) if x is None else x.chunk(2, dim=1) for x in (self.codes, self.scales, self.lows)]
        shape = (self.shape[0], self.shape[1] // 2, self.shape[2])
        first, second = (self.like(shape, *(x[half] for x in parts)) for half in range(2))
        return first, second


def of_torchao(weight: torch.Tensor) -> Weight | None:
    """torchao's float8 with a scale for each row, or for blocks; codes and scales are multiplied as ours are."""
    block = tuple(weight.block_size)[-2:] if weight.block_size else tuple(weight.shape[-2:])
    rows, columns = (WHOLE if size == whole else size for size, whole in zip(block, weight.shape[-2:], strict=True))
    grid = (*weight.shape[:-2], -(-weight.shape[-2] // block[0]), -(-weight.shape[-1] // block[1]))
    if weight.act_quant_kwargs is not None or weight.scale.numel() != torch.Size(grid).numel():
        return None
    return Weight(
        weight.qdata.view(torch.uint8), weight.scale.view(grid), None, tuple(weight.shape), 1, (rows, columns)
    )


def of_ours(form: int, weight: torch.Tensor) -> Weight:
    return Weight(
        weight.packed.view(torch.uint8), weight.scales, weight.lows, tuple(weight.shape), form, weight.state.block
    )


# A class of tensors by its full name, since it need not be installed -> how a Weight is made of one.
KINDS = {
    full_name(Fp8Weight): partial(of_ours, 1),
    full_name(Int4Weight): partial(of_ours, 2),
    TORCHAO: of_torchao,
}


def weight_of(tensor: torch.Tensor) -> Weight | None:
    """What the kernels read of a parameter, or None where they can't."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return Weight(tensor, None, None, tuple(tensor.shape), 0, (1, 1))
    name = full_name(type(tensor))
    weight = KINDS[name](tensor) if name in KINDS else None
    # Runs, and a step's depth, lie within blocks; every matrix begins with a byte and a block of its own.
    fits = weight is not None and weight.block[1] % (RUN * weight.form) == 0 and weight.shape[-1] % weight.form == 0
    return weight if fits else None


def alike(*weights: Weight | None) -> bool:
    """Whether one launch can read them all."""
    return None not in weights and len({(x.form, x.block, x.lows is None) for x in weights if x is not None}) == 1


def settings(*weights: Weight, part: int = 0) -> dict[str, tuple]:
    """What the kernels know of weights that are `alike` when they are compiled: form, rows and columns of a block,
    whether there are lows, and whether rows, and parts of so many columns, are whole runs, which are read at once."""
    first = weights[0]
    whole = first.form > 0 and not any(size % (RUN * first.form) for size in (part, *(x.shape[-1] for x in weights)))
    return {"STORED": (first.form, *first.block, first.lows is not None, whole)}


def step_within(weight: Weight, depth: int) -> int:
    """The depth of a matrix product's step: within a block, whose scale it meets."""
    return depth if weight.form == 0 else min(depth, weight.block[1])


@triton.jit
def of_matrix(weight, codes, scales):
    """The same pointers, so many codes and scales further on."""
    return weight[0] + codes, weight[1] + scales, weight[2] + scales


@triton.jit
def scale_tile(weight, place, mask, LOWS: tl.constexpr):
    scales = tl.load(weight[1] + place, mask=mask, other=0.0).to(tl.float32)
    lows = scales
    if LOWS:
        lows = tl.load(weight[2] + place, mask=mask, other=0.0).to(tl.float32)
    return scales, lows


@triton.jit
def bytes_of(numbers, STORED: tl.constexpr):
    """Of a row, or from its beginning on, how many bytes so many numbers take."""
    count = numbers // STORED[0]
    return tl.multiple_of(count, BYTES) if STORED[4] else count


@triton.jit
def asked(
    weight,
    column,
    inside,
    start,
    end,
    depth,
    STORED: tl.constexpr,
    BLOCK_A: tl.constexpr,
    ONCE: tl.constexpr,  # no other program reads it
):
    """Of rows `column` [C] of a matrix whose rows are `depth` long: what is stored of `start` to start + BLOCK_A.

    From `end` on it is 0. Values are [C, A], bytes [C, runs, BYTES]; scales and lows [C, runs].
    """
    FORM: tl.constexpr = STORED[0]
    row = column.to(tl.int64)
    if FORM == 0:
        step = start + tl.arange(0, BLOCK_A)
        mask = inside[:, None] & (step < end)[None, :]
        place = weight[0] + row[:, None] * depth + step[None, :]
        got = (tl.load(place, mask=mask, other=0.0, eviction_policy="evict_first" if ONCE else ""),)
    else:
        run, byte = tl.arange(0, BLOCK_A // (BYTES * FORM)), tl.arange(0, BYTES)
        first = start + run * (BYTES * FORM)
        places = (bytes_of(start, STORED) + run * BYTES)[:, None] + byte[None, :]
        if STORED[4]:
            mask = inside[:, None, None] & (first < end)[None, :, None]
        else:
            mask = inside[:, None, None] & (places * FORM < end)[None, :, :]
        codes = weight[0] + row[:, None, None] * bytes_of(depth, STORED) + places[None, :, :]
        codes = tl.load(codes, mask=mask, other=0, eviction_policy="evict_first" if ONCE else "")
        grid = (row // STORED[1])[:, None] * tl.cdiv(depth, STORED[2]) + (first // STORED[2])[None, :]
        scales, lows = scale_tile(weight, grid, inside[:, None] & (first < end)[None, :], STORED[3])
        got = (codes, scales, lows)
    return got


@triton.jit
def sums_of(STORED: tl.constexpr, BLOCK_A: tl.constexpr):
    """How many sums of a row `times` gives."""
    return BLOCK_A if STORED[0] == 0 else BLOCK_A // (BYTES * STORED[0])


@triton.jit
def above_128(byte, SHIFT: tl.constexpr, dtype: tl.constexpr):
    """128 plus the lower code of a byte (SHIFT 0), or the higher one (4), exact in any type: bits of a mantissa, since
    a card converts integers at an eighth of the speed."""
    if dtype == tl.float32:
        bits = (byte.to(tl.int32) << (16 - SHIFT)) & 0xF0000 | 0x43000000
    elif dtype == tl.float16:
        bits = (byte.to(tl.int16) << 3 >> SHIFT) & 0x78 | 0x5800
    else:
        tl.static_assert(dtype == tl.bfloat16)
        bits = (byte.to(tl.int16) >> SHIFT) & 0xF | 0x4300
    return bits.to(dtype, bitcast=True)


@triton.jit
def lows_of(scales, lows, STORED: tl.constexpr):
    """What each x adds beside its code times the scale, of codes that are `above_128`."""
    out = lows
    if STORED[0] == 2:
        out = (lows if STORED[3] else 0.0) - 128 * scales
    return out


@triton.jit
def times(x, got, STORED: tl.constexpr, BLOCK_A: tl.constexpr):
    """x [A] in float32 times what was `asked` for: products, or their sums over runs, [C, .] to be summed up."""
    FORM: tl.constexpr = STORED[0]
    if FORM == 0:
        out = x[None, :] * got[0].to(tl.float32)
    else:
        runs: tl.constexpr = BLOCK_A // (BYTES * FORM)
        if FORM == 1:
            x = tl.reshape(x, (runs, BYTES))
            sums = tl.sum(x[None, :, :] * got[0].to(tl.float8e4nv, bitcast=True).to(tl.float32), axis=2)
            of_x = x
        else:
            even, odd = tl.split(tl.reshape(x, (BLOCK_A // 2, 2)))
            even, odd = tl.reshape(even, (runs, BYTES)), tl.reshape(odd, (runs, BYTES))
            sums = tl.sum(even[None, :, :] * above_128(got[0], 0, tl.float32), axis=2)
            sums += tl.sum(odd[None, :, :] * above_128(got[0], 4, tl.float32), axis=2)
            of_x = even + odd
        out = sums * got[1]
        if STORED[3] or FORM == 2:
            out += tl.sum(of_x, axis=1)[None, :] * lows_of(got[1], got[2], STORED)
    return out


@triton.jit
def rows_of_x(x, mask_row, start, end, STORED: tl.constexpr, BLOCK_A: tl.constexpr):
    """x [T, A] of pointers [T, 1] to rows, from `start` to start + BLOCK_A, 0 from `end` on: whole, or of two codes a
    byte the even columns and the odd."""
    if STORED[0] == 2:
        step = start + 2 * tl.arange(0, BLOCK_A // 2)
        mask = mask_row & (step < end)[None, :]
        got = (tl.load(x + step[None, :], mask=mask, other=0.0), tl.load(x + step[None, :] + 1, mask=mask, other=0.0))
    else:
        step = start + tl.arange(0, BLOCK_A)
        got = (tl.load(x + step[None, :], mask=mask_row & (step < end)[None, :], other=0.0),)
    return got


@triton.jit
def plus_product(
    total,
    x,  # as `rows_of_x` gives it
    weight,
    column,
    inside,
    start,  # a multiple of BLOCK_A, of which a block's columns are another
    end,
    depth,
    STORED: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """total [T, C] + x W^T of one step of the depth, by a matrix product."""
    FORM: tl.constexpr = STORED[0]
    row = column.to(tl.int64)
    dtype: tl.constexpr = x[0].dtype
    if FORM == 0:
        step = start + tl.arange(0, BLOCK_A)
        mask = (step < end)[:, None] & inside[None, :]
        values = tl.load(weight[0] + row[None, :] * depth + step[:, None], mask=mask, other=0)
        total = tl.dot(x[0], values, total, input_precision="ieee")
    else:
        byte = tl.arange(0, BLOCK_A // FORM)
        step = bytes_of(start, STORED) + byte
        # Of whole runs none is cut, and what is said of a run's first byte lets it be read at once.
        ahead = start + byte // BYTES * BYTES * FORM if STORED[4] else step * FORM
        mask = (ahead < end)[:, None] & inside[None, :]
        codes = weight[0] + row[None, :] * bytes_of(depth, STORED) + step[:, None]
        codes = tl.load(codes, mask=mask, other=0)
        place = row // STORED[1] * tl.cdiv(depth, STORED[2]) + start // STORED[2]
        scales, lows = scale_tile(weight, place, inside, STORED[3])
        if FORM == 1:
            sums = tl.dot(x[0], codes.to(tl.float8e4nv, bitcast=True).to(dtype), input_precision="ieee")
            of_x = x[0].to(tl.float32)
        else:
            sums = tl.dot(x[0], above_128(codes, 0, dtype), input_precision="ieee")
            sums = tl.dot(x[1], above_128(codes, 4, dtype), sums, input_precision="ieee")
            of_x = x[0].to(tl.float32) + x[1].to(tl.float32)
        total += sums * scales[None, :]
        if STORED[3] or FORM == 2:
            total += tl.sum(of_x, axis=1)[:, None] * lows_of(scales, lows, STORED)[None, :]
    return total
