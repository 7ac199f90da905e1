"""Matrix products of few rows, which are as fast as their weights are read.

Shapes: T rows, N heads (1 for an ordinary product), A depth, C columns.
"""

import torch
import triton
import triton.language as tl

from . import few_tokens
from .norms import rms_norm
from .overlap import LINE, OVERLAP, fetch, let_next_start, wait_for_last

COLUMNS, DEPTH, STAGES = 16, 512, 4  # of a program, of a step, steps in flight


@triton.jit
def product_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    weight2_ptr,
    out2_ptr,
    weight3_ptr,
    out3_ptr,
    count_ptr,
    counted,
    rows,
    depth,
    columns,
    columns2,
    columns3,
    x_row,
    x_head,
    weight_head,
    weight_column,
    weight_depth,
    out_row,
    out_head,
    WEIGHTS: tl.constexpr,
    COUNTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
    LINES: tl.constexpr,
    LINE_VALUES: tl.constexpr,
):
    let_next_start()
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, column, step = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_A)
    base, out, width, stride = weight_ptr + head * weight_head, out_ptr + head * out_head, columns, out_row
    if WEIGHTS > 1:  # noqa: SIM102
        if block >= tl.cdiv(columns, BLOCK_C):
            block -= tl.cdiv(columns, BLOCK_C)
            base, out, width, stride = weight2_ptr, out2_ptr, columns2, columns2
            if WEIGHTS > 2:  # noqa: SIM102
                if block >= tl.cdiv(columns2, BLOCK_C):
                    block -= tl.cdiv(columns2, BLOCK_C)
                    base, out, width, stride = weight3_ptr, out3_ptr, columns3, columns3
    column += block * BLOCK_C
    real, inside = row < rows, column < width
    place = base + column[None, :].to(tl.int64) * weight_column + step[:, None] * weight_depth
    if LINES > 0:  # the depth lies together
        line = tl.minimum(tl.arange(0, LINES) * LINE_VALUES, depth - 1)
        fetch(base + tl.minimum(column, width - 1)[None, :].to(tl.int64) * weight_column + line[:, None])
    wait_for_last()
    if COUNTS:  # noqa: SIM102
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(count_ptr, tl.load(count_ptr) + counted)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for start in range(0, depth, BLOCK_A):
        here = step + start < depth
        x = tl.load(
            x_ptr + head * x_head + row[:, None] * x_row + (step + start)[None, :],
            mask=real[:, None] & here[None, :],
            other=0.0,
        )
        weight = tl.load(place + start * weight_depth, mask=here[:, None] & inside[None, :], other=0.0)
        total = tl.dot(x, weight, total, input_precision="ieee")
    target = out + row[:, None] * stride + column[None, :]
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=real[:, None] & inside[None, :])


def launch(
    x: torch.Tensor, weights: list, outs: list, columns: list[int], rows, heads, depth, strides, counted=None
) -> None:
    count = len(weights)
    missing = [None] * (3 - count)
    blocks = sum(triton.cdiv(size, COLUMNS) for size in columns)
    block_t = max(16, triton.next_power_of_2(rows))
    most = DEPTH * 32 // (block_t * x.element_size())  # shared memory holds so much of x a step
    values = LINE // x.element_size()
    lines = triton.next_power_of_2(triton.cdiv(depth, values)) if strides[4] == 1 else 0
    pairs = [tensor for pair in zip(weights + missing, outs + missing, strict=True) for tensor in pair]
    product_kernel[(heads, blocks)](
        x,
        *pairs,
        *(counted or (None, 0)),
        rows,
        depth,
        *(columns + [0] * (3 - count)),
        *strides,
        WEIGHTS=count,
        COUNTS=counted is not None,
        BLOCK_T=block_t,
        BLOCK_C=COLUMNS,
        BLOCK_A=min(most, max(16, triton.next_power_of_2(depth))),
        LINES=lines,
        LINE_VALUES=values,
        num_warps=4,
        num_stages=STAGES,
        **OVERLAP,
    )


def linear(
    x: torch.Tensor,
    *weights: torch.Tensor,
    norm: tuple[torch.Tensor, float] | None = None,
    counted: tuple[torch.Tensor, int] | None = None,
) -> list[torch.Tensor]:
    """x W^T [T, C] for each of one to three weights [C, A], in one launch, of x [T, A].

    Of x's RMSNorm where `norm` has its weight [A] and epsilon. The first that is `counted` grows by the second.
    """
    rows, depth = x.shape
    if rows <= few_tokens.MAX_TOKENS and (norm is None or depth <= few_tokens.TILE):
        return few_tokens.linear(x, weights, norm, counted)
    if norm is not None:
        x = rms_norm(x, *norm)
    columns = [len(weight) for weight in weights]
    outs = [torch.empty(rows, size, dtype=x.dtype, device=x.device) for size in columns]
    strides = (x.stride(0), 0, 0, depth, 1, columns[0], 0)
    launch(x, list(weights), outs, columns, rows, 1, depth, strides, counted)
    return outs


def per_head(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out[n, t, c] = sum_a x[n, t, a] weight[n, a, c] for any strides, x's last one and out's last one being 1."""
    heads, rows, depth = x.shape
    strides = (x.stride(1), x.stride(0), weight.stride(0), weight.stride(2), weight.stride(1), out.stride(1))
    launch(x, [weight], [out], [weight.shape[2]], rows, heads, depth, (*strides, out.stride(0)))
    return out
