"""A sum in place, of a tensor in float32 and one in fewer bits."""

import torch
import triton
import triton.language as tl

from .launch import FUSED

BLOCK = 4096


@triton.jit
def add_kernel(total, part, size, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = places < size
    value = tl.load(total + places, mask=mask) + tl.load(part + places, mask=mask).to(tl.float32)
    tl.store(total + places, value, mask=mask)


def add_to(total: torch.Tensor, part: torch.Tensor) -> None:
    """total += part, both contiguous and of one shape."""
    add_kernel[(triton.cdiv(total.numel(), BLOCK),)](total, part, total.numel(), BLOCK=BLOCK, num_warps=8, **FUSED)
