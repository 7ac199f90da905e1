"""What the grouped products share: which tile a program computes, and its loads and stores, by descriptor (TMA) or by
pointer. By descriptor, what lies outside a tensor reads as zero and is not written."""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor


def precision(dtype: torch.dtype) -> str:
    """How float32 products are computed: as torch.set_float32_matmul_precision says."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def low_rank(factor: torch.Tensor | None) -> dict[str, int]:
    """What a kernel is told of a factor [E, size, rank]; a product takes at least 16."""
    rank = 0 if factor is None else factor.shape[-1]
    return {"RANK": rank, "PADDED": max(16, triton.next_power_of_2(rank))}


def described(tensor: torch.Tensor, columns: int) -> bool:
    """Whether TMA moves tiles of `columns` of a contiguous `tensor`: a Hopper card, rows aligned to 16 bytes.

    Not for exact float32, whose products by ordinary instructions then spill registers.
    """
    if tensor.is_cuda:
        exact = tensor.dtype == torch.float32 and precision(tensor.dtype) == "ieee"
        if exact or torch.version.cuda is None or torch.cuda.get_device_capability(tensor.device)[0] < 9:
            return False
    size = tensor.element_size()
    aligned = tensor.data_ptr() % 16 == 0 and tensor.shape[-1] * size % 16 == 0
    return aligned and tensor.numel() > 0 and columns * size >= 16


def operand(tensor: torch.Tensor, *block: int) -> TensorDescriptor | torch.Tensor:
    """`tensor` as a kernel takes it: a descriptor of its blocks where TMA can move them, else the tensor itself."""
    return TensorDescriptor.from_tensor(tensor, list(block)) if described(tensor, block[-1]) else tensor


@triton.jit
def locate(program, rows, cols, GROUP: tl.constexpr):
    """(row, column) of a tile; programs that run together share GROUP rows, whose operands then stay in L2."""
    band = program // (GROUP * cols) * GROUP
    height = tl.minimum(rows - band, GROUP)
    within = program % (GROUP * cols)
    return band + within % height, within // height


@triton.jit
def rows_tile(a, row, sources, depth, size, TMA: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """Columns depth to depth + BLOCK of a [., size]: its rows from `row` on by descriptor, or `sources` by pointer."""
    if TMA:
        tile = a.load([row, depth])
    else:
        columns = depth + tl.arange(0, BLOCK)
        pointers = a + sources[:, None] * size + columns[None, :]
        tile = tl.load(pointers) if EVEN else tl.load(pointers, mask=columns[None, :] < size, other=0.0)
    return tile


@triton.jit
def matrix_tile(w, matrix, row, col, rows, cols, TMA: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The tile of w [E, rows, cols] at (matrix, row, col)."""
    if TMA:
        tile = w.load([matrix, row, col]).reshape(ROWS, COLS)
    else:
        r, c = row + tl.arange(0, ROWS), col + tl.arange(0, COLS)
        start = w + matrix.to(tl.int64) * rows * cols
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


@triton.jit
def with_added(
    acc,
    bias,  # [E, size]
    low,
    factor,  # [E, size, RANK]
    starts,
    expert,
    cols,
    size,
    HAS_BIAS: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
):
    """acc + low factor_e^T + b_e at the columns `cols`; of each row low has RANK numbers from `starts` on."""
    if RANK > 0:
        rank = tl.arange(0, PADDED)
        left = tl.load(low + starts[:, None] + rank[None, :], mask=(rank < RANK)[None, :], other=0.0)
        at = factor + (expert.to(tl.int64) * size + cols[:, None]) * RANK + rank[None, :]
        right = tl.load(at, mask=(cols < size)[:, None] & (rank < RANK)[None, :], other=0.0)
        acc = tl.dot(left, right.T, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + expert * size + cols, mask=cols < size, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def store_tile(out, tile, row, col, size, TMA: tl.constexpr):
    """Write `tile` to out [., size] at (row, col)."""
    if TMA:
        out.store([row, col], tile)
    else:
        rows, cols = tl.arange(0, tile.shape[0])[:, None], (col + tl.arange(0, tile.shape[1]))[None, :]
        # The tile's first row goes into the base, so that the other numbers stay narrow.
        tl.store(out + row.to(tl.int64) * size + rows * size + cols, tile, mask=cols < size)


@triton.jit
def split_columns(tile, PARTS: tl.constexpr):
    """A tuple of PARTS (a power of two) tiles side by side."""
    if PARTS == 1:
        parts = (tile,)
    else:
        left, right = tl.split(tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1))
        parts = split_columns(left, PARTS // 2) + split_columns(right, PARTS // 2)
    return parts
