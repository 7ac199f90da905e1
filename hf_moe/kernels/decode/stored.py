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

    @property
    def settings(self) -> dict[str, int]:
        """What the kernels know when they are compiled."""
        return {"FORM": self.form, "ROWS": self.block[0], "COLS": self.block[1], "LOWS": self.lows is not None}

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
def asked(
    weight,
    column,
    inside,
    start,
    end,
    depth,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    LOWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    ONCE: tl.constexpr,  # no other program reads it
):
    """Of rows `column` [C] of a matrix whose rows are `depth` long: what is stored of `start` to start + BLOCK_A.

    From `end` on it is 0. Values are [C, A], bytes [C, runs, BYTES]; scales and lows [C, runs].
    """
    row = column.to(tl.int64)
    if FORM == 0:
        step = start + tl.arange(0, BLOCK_A)
        mask = inside[:, None] & (step < end)[None, :]
        place = weight[0] + row[:, None] * depth + step[None, :]
        got = (tl.load(place, mask=mask, other=0.0, eviction_policy="evict_first" if ONCE else ""),)
    else:
        run, byte = tl.arange(0, BLOCK_A // (BYTES * FORM)), tl.arange(0, BYTES)
        first = start + run * (BYTES * FORM)
        places = (first // FORM)[:, None] + byte[None, :]
        mask = inside[:, None, None] & (places * FORM < end)[None, :, :]
        codes = weight[0] + row[:, None, None] * (depth // FORM) + places[None, :, :]
        codes = tl.load(codes, mask=mask, other=0, eviction_policy="evict_first" if ONCE else "")
        grid = (row // ROWS)[:, None] * tl.cdiv(depth, COLS) + (first // COLS)[None, :]
        scales, lows = scale_tile(weight, grid, inside[:, None] & (first < end)[None, :], LOWS)
        got = (codes, scales, lows)
    return got


@triton.jit
def times(x, got, FORM: tl.constexpr, LOWS: tl.constexpr, BLOCK_A: tl.constexpr):
    """x [A] in float32 times what was `asked` for: products, or their sums over runs, [C, .] to be summed up."""
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
            sums = tl.sum(even[None, :, :] * (got[0] & 15).to(tl.float32), axis=2)
            sums += tl.sum(odd[None, :, :] * (got[0] >> 4).to(tl.float32), axis=2)
            of_x = even + odd
        out = sums * got[1]
        if LOWS:
            out += tl.sum(of_x, axis=1)[None, :] * got[2]
    return out


@triton.jit
def rows_of_x(x, mask_row, start, end, FORM: tl.constexpr, BLOCK_A: tl.constexpr):
    """x [T, A] of pointers [T, 1] to rows, from `start` to start + BLOCK_A, 0 from `end` on: whole, or of two codes a
    byte the even columns and the odd."""
    if FORM == 2:
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
    start,
    end,
    depth,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,  # a multiple of BLOCK_A, as `start` is
    LOWS: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """total [T, C] + x W^T of one step of the depth, by a matrix product."""
    row = column.to(tl.int64)
    step = start // FORM + tl.arange(0, BLOCK_A // FORM) if FORM > 0 else start + tl.arange(0, BLOCK_A)
    stride = depth // FORM if FORM > 0 else depth
    mask = (step * FORM < end)[:, None] & inside[None, :] if FORM > 0 else (step < end)[:, None] & inside[None, :]
    codes = tl.load(weight[0] + row[None, :] * stride + step[:, None], mask=mask, other=0)
    dtype: tl.constexpr = x[0].dtype
    if FORM == 0:
        total = tl.dot(x[0], codes, total, input_precision="ieee")
    else:
        scales, lows = scale_tile(weight, row // ROWS * tl.cdiv(depth, COLS) + start // COLS, inside, LOWS)
        if FORM == 1:
            sums = tl.dot(x[0], codes.to(tl.float8e4nv, bitcast=True).to(dtype), input_precision="ieee")
            of_x = x[0].to(tl.float32)
        else:
            sums = tl.dot(x[0], (codes & 15).to(dtype), input_precision="ieee")
            sums = tl.dot(x[1], (codes >> 4).to(dtype), sums, input_precision="ieee")
            of_x = x[0].to(tl.float32) + x[1].to(tl.float32)
        total += sums * scales[None, :]
        if LOWS:
            total += tl.sum(of_x, axis=1)[:, None] * lows[None, :]
    return total
