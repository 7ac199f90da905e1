"""Root-mean-square normalisation in one launch."""

import torch
import triton
import triton.language as tl

from .overlap import OVERLAP, let_next_start, wait_for_last


@triton.jit
def normalized(x, weight, size, eps, dtype: tl.constexpr):
    """RMSNorm of a vector, in any shape: rounded to its dtype before the weight, as the definition does."""
    values = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values) / size + eps)
    return ((values * scale).to(x.dtype).to(tl.float32) * weight).to(dtype)


@triton.jit
def rms_norm_kernel(
    x_ptr, change_ptr, weight_ptr, sum_ptr, out_ptr, size, stride, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr
):
    let_next_start()
    wait_for_last()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * stride + columns, mask=inside, other=0.0)
    if ADDS:
        change = tl.load(change_ptr + row * size + columns, mask=inside, other=0.0)
        x = (x.to(tl.float32) + change.to(tl.float32)).to(x_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * size + columns, x, mask=inside)
    tl.store(out_ptr + row * size + columns, normalized(x, weight, size, eps, out_ptr.dtype.element_ty), mask=inside)


def launch(x: torch.Tensor, change: torch.Tensor | None, weight: torch.Tensor, eps: float):
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(rows.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    total = None if change is None else torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(rows.shape[1])
    rms_norm_kernel[(len(rows),)](
        rows,
        None if change is None else change.contiguous(),
        weight,
        total,
        out,
        rows.shape[1],
        rows.stride(0),
        eps,
        ADDS=change is not None,
        BLOCK=block,
        num_warps=max(1, min(8, block // 256)),
        **OVERLAP,
    )
    return total, out.view(x.shape)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 inside: [..., D] to [..., D]."""
    return launch(x, None, weight, eps)[1]


def add_rms_norm(
    x: torch.Tensor, change: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + change, and its norm."""
    total, normed = launch(x, change, weight, eps)
    return total.view(x.shape), normed
