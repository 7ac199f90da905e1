"""Attention of one new token in parts of the context, which run side by side, and their sum.

Shapes: B rows, H heads, S positions of the cache, r the size of what is summed. Of a part the kernels keep its
attention and the logarithm of the sum of its exponentials.
"""

import torch
import triton
import triton.language as tl

from .overlap import LINE, OVERLAP, fetch, let_next_start, wait_for_last

STEP = 32  # positions of a step
LINE_VALUES = tl.constexpr(LINE // 2)  # of two bytes
PROGRAMS = 132  # that run at once: one a processor
COLUMNS = 32  # of a program that sums the parts
FEW_PARTS = 16  # are summed on the way by those that have something else to do; more are a launch of many programs


@triton.jit
def bounds(length, split, splits, STEP: tl.constexpr):
    """The first of a part of so many positions, and the one behind its last."""
    length = length.to(tl.int32)
    chunk = tl.cdiv(tl.cdiv(length, splits), STEP) * STEP
    begin = split * chunk
    return begin, tl.minimum(begin + chunk, length)


@triton.jit
def fetch_rows(cache_ptr, begin, end, size, STEP: tl.constexpr):
    """The first STEP rows of a part, of `size` values each, to the card's cache."""
    here = tl.minimum(begin + tl.arange(0, STEP), tl.maximum(end - 1, 0))
    for column in range(0, size, LINE_VALUES):
        fetch(cache_ptr + here.to(tl.int64) * size + column)


@triton.jit
def capped(scores, softcap):
    """softcap tanh(scores / softcap)."""
    return softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)


@triton.jit
def attend(
    scores,
    value,
    seen,
    mask_ptr,
    mask_place,
    softcap,
    best,
    total,
    out,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """Take one step's scores [H, S] and values [S, r] into the largest score, the sum and the output so far."""
    if CAPPED:
        scores = capped(scores, softcap)
    if MASKED:
        seen = seen & (tl.load(mask_ptr + mask_place, mask=seen, other=0) != 0)
    scores = tl.where(seen[None, :], scores, float("-inf"))
    new_best = tl.maximum(best, tl.max(scores, axis=1))
    safe = tl.where(new_best == float("-inf"), 0.0, new_best)  # nothing to see so far
    weights = tl.exp(scores - safe[:, None])
    shrink = tl.exp(best - safe)
    total = total * shrink + tl.sum(weights, axis=1)
    out = tl.dot(weights.to(value.dtype), value, out * shrink[:, None], input_precision="ieee")
    return new_best, total, out


@triton.jit
def store_part(parts_ptr, lse_ptr, place, column, size, heads, inside, best, total, out):
    """Write a part of `heads` to its `place`s."""
    tl.store(lse_ptr + place, tl.where(total > 0, best + tl.log(total), float("-inf")), mask=heads)
    out = out / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(parts_ptr + place[:, None] * size + column[None, :], out, mask=heads[:, None] & inside[None, :])


@triton.jit
def combine_kernel(
    parts_ptr,
    lse_ptr,
    out_ptr,
    out_head,
    out_row,
    H,
    splits,
    rank,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The parts' mean by the exponentials of their sums."""
    let_next_start()
    wait_for_last()
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = column < rank
    first = (row * H + head) * splits
    part = tl.arange(0, BLOCK_N)
    real = part < splits
    lse = tl.load(lse_ptr + first + part, mask=real, other=float("-inf"))
    best = tl.max(lse, axis=0)
    weight = tl.exp(lse - tl.where(best == float("-inf"), 0.0, best))
    place = parts_ptr + (first + part[:, None]) * rank + column[None, :]
    rows = tl.load(place, mask=real[:, None] & inside[None, :], other=0.0)
    total, mass = tl.sum(rows * weight[:, None], axis=0), tl.sum(weight, axis=0)
    total = total / tl.maximum(mass, 1e-30)
    tl.store(out_ptr + head * out_head + row * out_row + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def step_of(cache: torch.Tensor, step: int = STEP) -> int:
    """Positions of a step; of four bytes a value half as many fit."""
    return step if cache.element_size() == 2 else step // 2


def number_of_parts(programs: int, cache: torch.Tensor, least: int, at_once: int = PROGRAMS) -> int:
    """So many that all, of `programs` programs each, fill the card, which runs `at_once`; of `least` positions."""
    return max(1, min(at_once // programs, triton.cdiv(cache.shape[2], least)))


def room_for_parts(rows: int, heads: int, parts: int, cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory for the parts [B, H, parts, r] and their logarithms, in float32."""
    values = torch.empty(rows, heads, parts, cache.shape[3], dtype=torch.float32, device=cache.device)
    return values, torch.empty(values.shape[:3], dtype=torch.float32, device=cache.device)


def sum_of_parts(parts: torch.Tensor, lse: torch.Tensor, out: torch.Tensor) -> None:
    """out [H, B, r] of the parts [B, H, splits, r] and the logarithms of their sums."""
    rows, heads, splits, rank = parts.shape
    columns = min(COLUMNS, triton.next_power_of_2(rank))
    combine_kernel[(rows, heads, triton.cdiv(rank, columns))](
        parts,
        lse,
        out,
        out.stride(0),
        out.stride(1),
        heads,
        splits,
        rank,
        BLOCK_N=triton.next_power_of_2(splits),
        BLOCK_R=columns,
        num_warps=4,
        **OVERLAP,
    )
