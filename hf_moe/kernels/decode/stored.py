"""Weights as the kernels of a step read them: plain, or stored in 8 or 4 bits with a scale for each block.

A form is 0 where the values are stored, 1 for float8 e4m3, 2 for 4-bit codes. Of a form that is not 0, a value is its
code times its block's scale, plus the block's low if there are lows. Products use the codes, which are small numbers
and exact, and multiply their sums with the scales.

Of 4 bits, words of 32 are read, and four of them are a run of 32 columns (`Int4Weight` has them in bytes): word k has
columns 2 k + 8 j in its lower half, j = 0 ... 3 from the lowest bits on, and 2 k + 8 j + 1 in its upper half. So one
shift and one mask give j's two codes of a word, which follow each other in x, as tensor cores take them; and a run's
codes of one j are multiplied by 8 numbers of x that follow each other, which a thread reads at once.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...stored_weights import TORCHAO, Fp8Weight, Int4Weight, full_name

RUN = 16  # bytes that a thread reads at once: of a run, products are summed before they meet the scale
BYTES = tl.constexpr(RUN)
STEP = (1, 16, 64)  # columns that a block must have: a run's, and those of a matrix product's smallest step
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


def of_ours(form: int, unit: torch.dtype, weight: torch.Tensor) -> Weight:
    return Weight(weight.packed.view(unit), weight.scales, weight.lows, tuple(weight.shape), form, weight.state.block)


# A class of tensors by its full name, since it need not be installed -> how a Weight is made of one.
KINDS = {
    full_name(Fp8Weight): partial(of_ours, 1, torch.uint8),
    full_name(Int4Weight): partial(of_ours, 2, torch.int32),
    TORCHAO: of_torchao,
}


def weight_of(tensor: torch.Tensor) -> Weight | None:
    """What the kernels read of a parameter, or None where they can't."""
    if type(tensor) in (torch.Tensor, torch.nn.Parameter):
        return Weight(tensor, None, None, tuple(tensor.shape), 0, (1, 1))
    name = full_name(type(tensor))
    weight = KINDS[name](tensor) if name in KINDS else None
    # Runs, and a step's depth, lie within blocks.
    return weight if weight is not None and weight.block[1] % STEP[weight.form] == 0 else None


def alike(*weights: Weight | None) -> bool:
    """Whether one launch can read them all."""
    return None not in weights and len({(x.form, x.block, x.lows is None) for x in weights if x is not None}) == 1


def settings(*weights: Weight, part: int = 0) -> dict[str, tuple]:
    """What the kernels know of weights that are `alike` when they are compiled: form, rows and columns of a block,
    whether there are lows, and whether rows, and parts of so many columns, are whole runs, which are read at once."""
    first = weights[0]
    whole = first.form == 2 or not any(size % RUN for size in (part, *(x.shape[-1] for x in weights)))
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
def place_of(column, STORED: tl.constexpr):
    """Where a run that begins with that column is in its row: in bytes, of 4 bits in words."""
    place = column // 32 * 4 if STORED[0] == 2 else column
    if STORED[0] == 1 and STORED[4]:
        place = tl.multiple_of(place, BYTES)
    return place


@triton.jit
def row_of(depth, STORED: tl.constexpr):
    """From one row to the next, so."""
    return place_of(depth + 31 if STORED[0] == 2 else depth, STORED)


@triton.jit
def columns_of(STORED: tl.constexpr, BLOCK_A: tl.constexpr):
    """The columns of a step as `times` takes them: [A], of 4 bits [4 runs, 8], first of each run what is multiplied by
    the words' first codes, so that a thread that reads a row here and there has all of a run."""
    if STORED[0] == 2:
        row, RUNS = tl.arange(0, BLOCK_A // 8), BLOCK_A // 32
        columns = (row % RUNS * 32 + row // RUNS * 8)[:, None] + tl.arange(0, 8)[None, :]
    else:
        columns = tl.arange(0, BLOCK_A)
    return columns


@triton.jit
def units_of(start, end, STORED: tl.constexpr, UNITS: tl.constexpr, RUNS: tl.constexpr):
    """Where in its row the bytes or words of so many runs are, and which of them begin before `end`."""
    unit = tl.arange(0, RUNS * UNITS)
    # Of whole runs none is cut, and what is said of a run's first unit lets it be read at once.
    ahead = unit // UNITS * (BYTES * STORED[0]) if STORED[4] else unit
    return place_of(start, STORED) + unit, start + ahead < end


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

    From `end` on it is 0, or x is. Values are [C, A], bytes [C, runs, 16], words [C, runs, 4]; scales and lows
    [C, runs].
    """
    FORM: tl.constexpr = STORED[0]
    row = column.to(tl.int64)
    if FORM == 0:
        step = start + tl.arange(0, BLOCK_A)
        mask = inside[:, None] & (step < end)[None, :]
        place = weight[0] + row[:, None] * depth + step[None, :]
        got = (tl.load(place, mask=mask, other=0.0, eviction_policy="evict_first" if ONCE else ""),)
    else:
        UNITS: tl.constexpr = BYTES if FORM == 1 else 4
        run: tl.constexpr = BYTES * FORM
        runs: tl.constexpr = BLOCK_A // run
        first = start + tl.arange(0, runs) * run
        place, mask = units_of(start, end, STORED, UNITS, runs)
        codes = weight[0] + row[:, None] * row_of(depth, STORED) + place[None, :]
        mask = inside[:, None] & mask[None, :]
        codes = tl.load(codes, mask=mask, other=0, eviction_policy="evict_first" if ONCE else "")
        codes = tl.reshape(codes, (column.shape[0], runs, UNITS))
        grid = (row // STORED[1])[:, None] * tl.cdiv(depth, STORED[2]) + (first // STORED[2])[None, :]
        scales, lows = scale_tile(weight, grid, inside[:, None] & (first < end)[None, :], STORED[3])
        got = (codes, scales, lows)
    return got


@triton.jit
def halves_above_128(words, J: tl.constexpr, dtype: tl.constexpr):
    """128 plus the codes that a word has in the J-th place of its lower half, and of its upper one; exact in any type:
    bits of a mantissa, since a card converts integers at a fraction of the speed. In 16 bits both at once."""
    if dtype == tl.float32:
        lower, upper = (words << (16 - 4 * J)) & 0xF0000 | 0x43000000, (words >> (4 * J)) & 0xF0000 | 0x43000000
    else:
        if dtype == tl.float16:
            both = (words << 3 if J == 0 else words >> (4 * J - 3)) & 0x00780078 | 0x58005800
        else:
            tl.static_assert(dtype == tl.bfloat16)
            both = (words >> (4 * J)) & 0x000F000F | 0x43004300
        lower, upper = both.to(tl.int16), (both >> 16).to(tl.int16)
    return lower.to(dtype, bitcast=True), upper.to(dtype, bitcast=True)


@triton.jit
def lows_of(scales, lows, STORED: tl.constexpr):
    """What each x adds beside its code times the scale, of codes that are above 128."""
    out = lows
    if STORED[0] == 2:
        out = (lows if STORED[3] else 0.0) - 128 * scales
    return out


@triton.jit
def eighths(x, RUNS: tl.constexpr):
    """Of x [4 runs, 8], what the eight codes of words [runs, 4] are multiplied by, from the lowest bits on."""
    lower, upper = tl.split(tl.permute(tl.reshape(x, (2, 2, RUNS, 4, 2)), (2, 3, 0, 1, 4)))
    parts = ()
    for half in tl.static_range(2):
        even, odd = tl.split(upper if half else lower)
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        parts = parts + (first, second, third, fourth)  # noqa: RUF005
    return parts


@triton.jit
def plus_codes(products, x, words, N: tl.constexpr):
    """products + 2^-69 x times the N-th codes of words.

    Bits 4 a to 4 a + 3, the others 0, are a float32 as they stand: a code times 2^(4 a - 149), which is subnormal,
    exact, and multiplied as fast as others. The rest of the exponent is x's, which may reach 2^47, so that nothing is
    converted, and nothing shifted but what is too high for a mantissa.
    """
    PLACE: tl.constexpr = N if N < 5 else N - 3
    bits = (words if N < 5 else words >> 12) & (15 << (4 * PLACE))
    return products + (x * 2.0 ** (80 - 4 * PLACE))[None, :, :] * bits.to(tl.float32, bitcast=True)


@triton.jit
def times(x, got, STORED: tl.constexpr, BLOCK_A: tl.constexpr):
    """x of `columns_of` in float32 times what was `asked` for: products, or their sums over runs, [C, .] to be summed
    up."""
    FORM: tl.constexpr = STORED[0]
    if FORM == 0:
        out = x[None, :] * got[0].to(tl.float32)
    else:
        runs: tl.constexpr = BLOCK_A // (BYTES * FORM)
        if FORM == 1:
            x = tl.reshape(x, (runs, BYTES))
            products = x[None, :, :] * got[0].to(tl.float8e4nv, bitcast=True).to(tl.float32)
            of_x = x
        else:
            parts = eighths(x, runs)
            products, of_x = tl.zeros(got[0].shape, tl.float32), tl.zeros((runs, 4), tl.float32)
            for n in tl.static_range(8):
                products = plus_codes(products, parts[n], got[0], n)
                of_x += parts[n]
        out = tl.sum(products, axis=2) * (got[1] if FORM == 1 else got[1] * 2.0**69)
        if STORED[3]:
            out += tl.sum(of_x, axis=1)[None, :] * got[2]
    return out


@triton.jit
def rows_of_x(x, mask_row, start, end, STORED: tl.constexpr, BLOCK_A: tl.constexpr):
    """x [T, A] of pointers [T, 1] to rows, from `start` to start + BLOCK_A, 0 from `end` on: whole, or of 4 bits four
    [T, A / 4], of which the j-th has what the j-th codes of words are multiplied by."""
    PARTS: tl.constexpr = 4 if STORED[0] == 2 else 1
    step = tl.arange(0, BLOCK_A // PARTS)
    step = start + (step // 8 * 32 + step % 8 if PARTS == 4 else step)
    got = ()
    for j in tl.static_range(PARTS):
        column = step + 8 * j
        got = got + (tl.load(x + column[None, :], mask=mask_row & (column < end)[None, :], other=0.0),)  # noqa: RUF005
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
        UNITS: tl.constexpr = BYTES if FORM == 1 else 4
        runs: tl.constexpr = BLOCK_A // (BYTES * FORM)
        place, mask = units_of(start, end, STORED, UNITS, runs)
        codes = weight[0] + row[:, None] * row_of(depth, STORED) + place[None, :]
        codes = tl.load(codes, mask=inside[:, None] & mask[None, :], other=0)
        place = row // STORED[1] * tl.cdiv(depth, STORED[2]) + start // STORED[2]
        scales, lows = scale_tile(weight, place, inside, STORED[3])
        of_x = x[0].to(tl.float32)
        if FORM == 1:
            sums = tl.dot(x[0], tl.trans(codes.to(tl.float8e4nv, bitcast=True).to(dtype)), input_precision="ieee")
        else:
            sums = tl.zeros(total.shape, tl.float32)
            for j in tl.static_range(4):
                lower, upper = halves_above_128(codes, j, dtype)
                both = tl.reshape(tl.join(lower, upper), (column.shape[0], 2 * UNITS * runs))
                sums = tl.dot(x[j], tl.trans(both), sums, input_precision="ieee")
                if j > 0:
                    of_x += x[j].to(tl.float32)
        total += sums * scales[None, :]
        if STORED[3] or FORM == 2:
            total += tl.sum(of_x, axis=1)[:, None] * lows_of(scales, lows, STORED)[None, :]
    return total
