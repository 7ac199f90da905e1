"""Matrix products of few rows, which are as fast as their weights are read.

Shapes: T rows, A depth, C columns.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import few_tokens
from .adapters import Adapter
from .norms import rms_norm
from .overlap import LINE, OVERLAP, fetch, let_next_start, wait_for_last
from .stored import STEP, Weight, plus_product, row_of, rows_of_x, settings, step_within

COLUMNS, DEPTH, STAGES = 16, 512, 4  # of a program, of a step, steps in flight


@triton.jit
def product_kernel(
    x_ptr,
    weight,
    out_ptr,
    weight2,
    out2_ptr,
    weight3,
    out3_ptr,
    count_ptr,
    counted,
    rows,
    depth,
    columns,
    columns2,
    columns3,
    x_row,
    WEIGHTS: tl.constexpr,
    COUNTS: tl.constexpr,
    STORED: tl.constexpr,  # `stored.settings`
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
    LINES: tl.constexpr,
    LINE_VALUES: tl.constexpr,
):
    let_next_start()
    block = tl.program_id(0)
    row, column = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C)
    out, width = out_ptr, columns
    if WEIGHTS > 1:  # noqa: SIM102
        if block >= tl.cdiv(columns, BLOCK_C):
            block -= tl.cdiv(columns, BLOCK_C)
            weight, out, width = weight2, out2_ptr, columns2
            if WEIGHTS > 2:  # noqa: SIM102
                if block >= tl.cdiv(columns2, BLOCK_C):
                    block -= tl.cdiv(columns2, BLOCK_C)
                    weight, out, width = weight3, out3_ptr, columns3
    column += block * BLOCK_C
    real, inside = row < rows, column < width
    stride = row_of(depth, STORED)
    line = tl.minimum(tl.arange(0, LINES) * LINE_VALUES, stride - 1)
    fetch(weight[0] + tl.minimum(column, width - 1)[None, :].to(tl.int64) * stride + line[:, None])
    wait_for_last()
    if COUNTS:  # noqa: SIM102
        if tl.program_id(0) == 0:
            tl.store(count_ptr, tl.load(count_ptr) + counted)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in range(0, depth, BLOCK_A):
        x = rows_of_x(x_ptr + row[:, None] * x_row, real[:, None], start, depth, STORED, BLOCK_A)
        total = plus_product(total, x, weight, column, inside, start, depth, depth, STORED, BLOCK_A)
    target = out + row[:, None] * width + column[None, :]
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=real[:, None] & inside[None, :])


def most_depth(rows: int, x: torch.Tensor, depth: int, least: int = 16) -> int:
    """Of a step, so that shared memory holds its x; tensor cores take no fewer than `least`."""
    return min(DEPTH * 32 // (rows * x.element_size()), max(least, triton.next_power_of_2(depth)))


def of_few(rows: int, depth: int, weight: Weight, normed: bool) -> bool:
    """Whether the kernels for few rows compute it."""
    return rows <= few_tokens.MAX_TOKENS and (not normed or depth <= few_tokens.TILES[weight.form])


def linear(
    x: torch.Tensor,
    *weights: Weight,
    norm: tuple[torch.Tensor, float] | None = None,
    counted: tuple[torch.Tensor, int] | None = None,
    adapters: Sequence[Adapter | None] = (),
) -> list[torch.Tensor]:
    """x W^T [T, C] for each of one to three weights [C, A] of one form, in one launch, of x [T, A].

    Of x's RMSNorm where `norm` has its weight [A] and epsilon. The first that is `counted` grows by the second. Of few
    rows plus what their `adapters` add.
    """
    (rows, depth), first = x.shape, weights[0]
    if of_few(rows, depth, first, norm is not None):
        return few_tokens.linear(x, weights, norm, counted, adapters)
    assert not any(adapters), adapters
    if norm is not None:
        x = rms_norm(x, *norm)
    columns = [weight.shape[0] for weight in weights]
    outs = [torch.empty(rows, size, dtype=x.dtype, device=x.device) for size in columns]
    missing = [None] * (3 - len(weights))
    block_t, values = max(16, triton.next_power_of_2(rows)), LINE // first.codes.element_size()
    pointers = [weight.pointers for weight in weights]
    pairs = [y for pair in zip([*pointers, *missing], outs + missing, strict=True) for y in pair]
    product_kernel[(sum(triton.cdiv(size, COLUMNS) for size in columns),)](
        x,
        *pairs,
        *(counted or (None, 0)),
        rows,
        depth,
        *(columns + [0] * len(missing)),
        x.stride(0),
        WEIGHTS=len(weights),
        COUNTS=counted is not None,
        **settings(*weights),
        BLOCK_T=block_t,
        BLOCK_C=COLUMNS,
        BLOCK_A=step_within(first, most_depth(block_t, x, depth, max(16, STEP[first.form]))),
        LINES=triton.next_power_of_2(triton.cdiv(first.codes.shape[-1], values)),
        LINE_VALUES=values,
        num_warps=4,
        num_stages=STAGES,
        **OVERLAP,
    )
    return outs


@triton.jit
def per_head_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    depth,
    columns,
    x_row,
    x_head,
    weight_head,
    weight_column,
    weight_depth,
    out_row,
    out_head,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    let_next_start()
    wait_for_last()
    head, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    row, step = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_A)
    real, inside = row < rows, column < columns
    place = weight_ptr + head * weight_head + column[None, :] * weight_column + step[:, None] * weight_depth
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in range(0, depth, BLOCK_A):
        here = step + start < depth
        x = x_ptr + head * x_head + row[:, None] * x_row + (step + start)[None, :]
        x = tl.load(x, mask=real[:, None] & here[None, :], other=0.0)
        weight = tl.load(place + start * weight_depth, mask=here[:, None] & inside[None, :], other=0.0)
        total = tl.dot(x, weight, total, input_precision="ieee")
    target = out_ptr + head * out_head + row[:, None] * out_row + column[None, :]
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=real[:, None] & inside[None, :])


def per_head(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out[n, t, c] = sum_a x[n, t, a] weight[n, a, c] for any strides, x's last one and out's last one being 1."""
    (heads, rows, depth), columns = x.shape, weight.shape[2]
    block_t = max(16, triton.next_power_of_2(rows))
    per_head_kernel[(heads, triton.cdiv(columns, COLUMNS))](
        x,
        weight,
        out,
        rows,
        depth,
        columns,
        x.stride(1),
        x.stride(0),
        weight.stride(0),
        weight.stride(2),
        weight.stride(1),
        out.stride(1),
        out.stride(0),
        BLOCK_T=block_t,
        BLOCK_C=COLUMNS,
        BLOCK_A=most_depth(block_t, x, depth),
        num_warps=4,
        num_stages=STAGES,
        **OVERLAP,
    )
    return out
