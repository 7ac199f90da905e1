"""What the grouped products share: which tile a program computes, and its loads, by descriptor (TMA) or by pointer."""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


def described(tensor: torch.Tensor, block: list[int]) -> bool:
    """Whether TMA can load blocks of `tensor`: a Hopper card, 16-byte alignment throughout, contiguous last axis."""
    if tensor.is_cuda and torch.cuda.get_device_capability(tensor.device)[0] < 9:
        return False
    size = tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and all(step * size % 16 == 0 for step in tensor.stride()[:-1])
    return aligned and tensor.stride(-1) == 1 and tensor.numel() > 0 and block[-1] * size >= 16


def operand(tensor: torch.Tensor, block: list[int]) -> TensorDescriptor | torch.Tensor:
    """`tensor` as a kernel takes it: a descriptor of its blocks where TMA can load them, else the tensor itself."""
    return TensorDescriptor.from_tensor(tensor, block) if described(tensor, block) else tensor


@triton.jit
def locate(program, rows, cols, GROUP: tl.constexpr):
    """(row, column) of a tile; programs that run together share GROUP rows, whose operands then stay in L2."""
    band = program // (GROUP * cols) * GROUP
    height = tl.minimum(rows - band, GROUP)
    within = program % (GROUP * cols)
    return band + within % height, within // height


@triton.jit
def rows_tile(a, rows, first, depth, size, stride, TMA: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Columns depth to depth + BLOCK of a [., size]: its rows `first` onward by descriptor, or `rows` by pointer."""
    if TMA:
        tile = a.load([first, depth])
    else:
        columns = depth + tl.arange(0, BLOCK)
        pointers = a + rows[:, None] * stride + columns[None, :]
        tile = tl.load(pointers) if EVEN else tl.load(pointers, mask=columns[None, :] < size, other=0.0)
    return tile


@triton.jit
def matrix_tile(w, expert, row, col, rows, cols, TMA: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tile of w [E, rows, cols] at (expert, row, col); zero outside the matrix."""
    if TMA:
        tile = w.load([expert, row, col]).reshape(ROWS, COLS)
    else:
        r, c = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
        start = w + expert.to(tl.int64) * rows * cols
        pointers = start + r[:, None].to(tl.int64) * cols + c[None, :]
        tile = tl.load(pointers, mask=(r[:, None] < rows) & (c[None, :] < cols), other=0.0)
    return tile


@triton.jit
def weight_tile(
    w,
    expert,
    depth,
    col,
    depth_size,
    col_size,
    LAST: tl.constexpr,
    TMA: tl.constexpr,
    DEPTH: tl.constexpr,
    COLS: tl.constexpr,
):
    """[DEPTH, COLS] of a weight whose axes are [E, columns, depth] if LAST, else [E, depth, columns]."""
    if LAST:
        tile = matrix_tile(w, expert, col, depth, col_size, depth_size, TMA, COLS, DEPTH).T
    else:
        tile = matrix_tile(w, expert, depth, col, depth_size, col_size, TMA, DEPTH, COLS)
    return tile
