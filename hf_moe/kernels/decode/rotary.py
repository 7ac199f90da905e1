"""RoPE of queries and keys of many tokens in one launch, and its cosines and sines in one.

Shapes: B rows, S tokens of a row, H query heads, N key heads, d head size.
"""

import torch
import triton
import triton.language as tl

from .overlap import OVERLAP, let_next_start, wait_for_last


@triton.jit
def rotary_kernel(
    query_ptr,
    key_ptr,
    cos_ptr,
    sin_ptr,
    query_out_ptr,
    key_out_ptr,
    tokens,
    rotary_row,
    H,
    N,
    size: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    HALF: tl.constexpr,
):
    """A token's heads: pairs (a, b) become (a cos - b sin, b cos + a sin), the first of all pairs, then the second."""
    token = tl.program_id(0).to(tl.int64)
    half: tl.constexpr = size // 2
    first: tl.constexpr = 2 if INTERLEAVED else 1
    step: tl.constexpr = 1 if INTERLEAVED else half
    head, pair = tl.arange(0, BLOCK_H), tl.arange(0, HALF)
    turn = (token // tokens) * rotary_row + (token % tokens) * size + pair
    real = pair < half
    cos_a = tl.load(cos_ptr + turn, mask=real, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos_ptr + turn + half, mask=real, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin_ptr + turn, mask=real, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin_ptr + turn + half, mask=real, other=0.0).to(tl.float32)[None, :]
    if tl.program_id(1) == 0:
        heads, source, target = H, query_ptr, query_out_ptr
    else:
        heads, source, target = N, key_ptr, key_out_ptr
    both = (head < heads)[:, None] & real[None, :]
    place = (token * heads + head[:, None]) * size
    a = tl.load(source + place + first * pair[None, :], mask=both, other=0.0).to(tl.float32)
    b = tl.load(source + place + first * pair[None, :] + step, mask=both, other=0.0).to(tl.float32)
    place += pair[None, :]
    tl.store(target + place, (a * cos_a - b * sin_a).to(query_ptr.dtype.element_ty), mask=both)
    tl.store(target + place + half, (b * cos_b + a * sin_b).to(query_ptr.dtype.element_ty), mask=both)


def rotated(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [B, H, S, d] and key [B, N, S, d] turned by cos and sin [B or 1, S, d]; in memory the heads come last."""
    query, key = (x.transpose(1, 2).contiguous() for x in (query, key))
    rows, tokens, heads, size = query.shape
    turned = torch.empty_like(query), torch.empty_like(key)
    rotary_kernel[(rows * tokens, 2)](
        query,
        key,
        cos.contiguous(),
        sin.contiguous(),
        *turned,
        tokens,
        tokens * size if len(cos) > 1 else 0,
        heads,
        key.shape[2],
        size,
        INTERLEAVED=interleaved,
        BLOCK_H=triton.next_power_of_2(max(heads, key.shape[2])),
        HALF=triton.next_power_of_2(size // 2),
        num_warps=4,
    )
    return tuple(x.transpose(1, 2) for x in turned)


@triton.jit
def angles_kernel(
    position_ptr,
    frequency_ptr,
    cos_ptr,
    sin_ptr,
    scaling,
    half,
    HALF: tl.constexpr,
):
    let_next_start()
    wait_for_last()
    row, pair = tl.program_id(0), tl.arange(0, HALF)
    real = pair < half
    angle = tl.load(position_ptr + row).to(tl.float32) * tl.load(frequency_ptr + pair, mask=real, other=0.0)
    cos, sin = tl.cos(angle) * scaling, tl.sin(angle) * scaling
    place = row * 2 * half + pair
    dtype: tl.constexpr = cos_ptr.dtype.element_ty
    tl.store(cos_ptr + place, cos.to(dtype), mask=real)
    tl.store(cos_ptr + place + half, cos.to(dtype), mask=real)
    tl.store(sin_ptr + place, sin.to(dtype), mask=real)
    tl.store(sin_ptr + place + half, sin.to(dtype), mask=real)


def angles(
    positions: torch.Tensor, frequencies: torch.Tensor, scaling: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B, S, d] of positions [B, S] times frequencies [d / 2] (float32), scaled; each half is the same."""
    half = len(frequencies)
    cos, sin = (torch.empty(*positions.shape, 2 * half, dtype=dtype, device=positions.device) for _ in range(2))
    angles_kernel[(positions.numel(),)](
        positions.contiguous(),
        frequencies,
        cos,
        sin,
        scaling,
        half,
        HALF=triton.next_power_of_2(half),
        num_warps=1,
        **OVERLAP,
    )
    return cos, sin
