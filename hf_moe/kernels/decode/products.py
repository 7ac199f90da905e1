"""Matrix products of few rows, which are as fast as their weights are read.

Shapes: T rows, N heads (1 for an ordinary product), A depth, C columns.
"""

import torch
import triton
import triton.language as tl

COLUMNS, DEPTH, STAGES = 16, 512, 4  # of a program, of a step, steps in flight


@triton.jit
def product_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    weight2_ptr,
    out2_ptr,
    rows,
    depth,
    columns,
    columns2,
    x_row,
    x_head,
    weight_head,
    weight_column,
    weight_depth,
    out_row,
    out_head,
    TWO: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    head, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, column, step = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_A)
    base, out, width, stride = weight_ptr + head * weight_head, out_ptr + head * out_head, columns, out_row
    if TWO:  # noqa: SIM102
        if block >= tl.cdiv(columns, BLOCK_C):
            block -= tl.cdiv(columns, BLOCK_C)
            base, out, width, stride = weight2_ptr + head, out2_ptr + head, columns2, columns2
    column += block * BLOCK_C
    real, inside = row < rows, column < width
    place = base + column[None, :].to(tl.int64) * weight_column + step[:, None] * weight_depth
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


def launch(x, weight, out, weight2, out2, rows, heads, depth, columns, strides):
    columns2 = 0 if weight2 is None else weight2.shape[0]
    blocks = triton.cdiv(columns, COLUMNS) + triton.cdiv(columns2, COLUMNS)
    product_kernel[(heads, blocks)](
        x,
        weight,
        out,
        weight2,
        out2,
        rows,
        depth,
        columns,
        columns2,
        *strides,
        TWO=weight2 is not None,
        BLOCK_T=max(16, triton.next_power_of_2(rows)),
        BLOCK_C=COLUMNS,
        BLOCK_A=min(DEPTH * 2 // max(2, x.element_size()), max(16, triton.next_power_of_2(depth))),
        num_warps=4,
        num_stages=STAGES,
    )


def linear(x: torch.Tensor, weight: torch.Tensor, weight2: torch.Tensor | None = None):
    """x W^T [T, C] of x [T, A] and W [C, A]; of two weights both products, in one launch."""
    rows, depth = x.shape
    out = torch.empty(rows, len(weight), dtype=x.dtype, device=x.device)
    out2 = None if weight2 is None else torch.empty(rows, len(weight2), dtype=x.dtype, device=x.device)
    strides = (x.stride(0), 0, 0, depth, 1, len(weight), 0)
    launch(x, weight, out, weight2, out2, rows, 1, depth, len(weight), strides)
    return out if weight2 is None else (out, out2)


def per_head(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out[n, t, c] = sum_a x[n, t, a] weight[n, a, c] for any strides, x's last one and out's last one being 1."""
    heads, rows, depth = x.shape
    strides = (x.stride(1), x.stride(0), weight.stride(0), weight.stride(2), weight.stride(1))
    launch(x, weight, out, None, None, rows, heads, depth, weight.shape[2], (*strides, out.stride(1), out.stride(0)))
    return out
