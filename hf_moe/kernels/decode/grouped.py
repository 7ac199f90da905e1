"""Multi-head, grouped-query and multi-query attention for one new token a row, in three launches.

Shapes: B rows, H query heads, N key heads, d head size, S positions of the cache. The cache has keys and values
[B, N, S, d], and on the device how many positions are filled.
"""

import torch
import triton
import triton.language as tl

from .overlap import OVERLAP, let_next_start, wait_for_last
from .parts import STAGES, WARPS, attend, bounds, room_for_parts, step_of, store_part, sum_of_parts


@triton.jit
def normed(
    a,
    b,
    weight_ptr,
    head,
    pair,
    both,
    count,
    eps,
    size: tl.constexpr,
    first: tl.constexpr,
    step: tl.constexpr,
    WHOLE: tl.constexpr,
    dtype: tl.constexpr,
):
    """RMSNorm of the vectors whose halves are a and b, each head's or all heads' at once."""
    squares = tl.sum(a * a + b * b, axis=1)
    if WHOLE:
        scale = tl.rsqrt(tl.sum(squares, axis=0) / count + eps)
        a, b = a * scale, b * scale
        place = weight_ptr + head[:, None] * size + first * pair[None, :]
    else:
        scale = tl.rsqrt(squares / size + eps)[:, None]
        a, b = a * scale, b * scale
        place = weight_ptr + head[:, None] * 0 + first * pair[None, :]
    a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
    a *= tl.load(place, mask=both, other=0.0).to(tl.float32)
    b *= tl.load(place + step, mask=both, other=0.0).to(tl.float32)
    return a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)


@triton.jit
def prepare_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    query_weight_ptr,
    key_weight_ptr,
    cos_ptr,
    sin_ptr,
    turned_ptr,
    keys_ptr,
    values_ptr,
    length_ptr,
    eps,
    rotary_row,
    cache_row,
    cache_head,
    H,
    N,
    size: tl.constexpr,
    NORM: tl.constexpr,  # 0 none, 1 a head, 2 all heads
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HALF: tl.constexpr,
):
    """Norm and rotate query and key; the query to `turned`, key and value to the cache's next place."""
    let_next_start()
    wait_for_last()
    row, length = tl.program_id(0).to(tl.int64), tl.load(length_ptr)
    dtype: tl.constexpr = keys_ptr.dtype.element_ty
    half: tl.constexpr = size // 2
    first: tl.constexpr = 2 if INTERLEAVED else 1
    step: tl.constexpr = 1 if INTERLEAVED else half
    pair = tl.arange(0, HALF)
    real = pair < half
    turn = row * rotary_row + pair
    cos_a = tl.load(cos_ptr + turn, mask=real, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos_ptr + turn + half, mask=real, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin_ptr + turn, mask=real, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin_ptr + turn + half, mask=real, other=0.0).to(tl.float32)[None, :]

    if tl.program_id(1) == 0:
        head = tl.arange(0, BLOCK_H)
        both = (head < H)[:, None] & real[None, :]
        place = query_ptr + (row * H + head[:, None]) * size + first * pair[None, :]
        a = tl.load(place, mask=both, other=0.0).to(tl.float32)
        b = tl.load(place + step, mask=both, other=0.0).to(tl.float32)
        if NORM > 0:
            a, b = normed(a, b, query_weight_ptr, head, pair, both, H * size, eps, size, first, step, NORM == 2, dtype)
        place = turned_ptr + (row * H + head[:, None]) * size + pair[None, :]
        tl.store(place, (a * cos_a - b * sin_a).to(dtype), mask=both)
        tl.store(place + half, (b * cos_b + a * sin_b).to(dtype), mask=both)
    else:
        # Names of their own: both branches are compiled, and the sizes differ.
        key_head = tl.arange(0, BLOCK_N)
        inside = (key_head < N)[:, None] & real[None, :]
        source = key_ptr + (row * N + key_head[:, None]) * size + first * pair[None, :]
        c = tl.load(source, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(source + step, mask=inside, other=0.0).to(tl.float32)
        if NORM > 0:
            c, d = normed(
                c, d, key_weight_ptr, key_head, pair, inside, N * size, eps, size, first, step, NORM == 2, dtype
            )
        cached = row * cache_row + key_head[:, None] * cache_head + length * size + pair[None, :]
        tl.store(keys_ptr + cached, (c * cos_a - d * sin_a).to(dtype), mask=inside)
        tl.store(keys_ptr + cached + half, (d * cos_b + c * sin_b).to(dtype), mask=inside)
        source = value_ptr + (row * N + key_head[:, None]) * size + pair[None, :]
        tl.store(values_ptr + cached, tl.load(source, mask=inside, other=0.0), mask=inside)
        tl.store(values_ptr + cached + half, tl.load(source + half, mask=inside, other=0.0), mask=inside)


@triton.jit
def split_kernel(
    query_ptr,
    keys_ptr,
    values_ptr,
    mask_ptr,
    length_ptr,
    out_ptr,
    lse_ptr,
    scale,
    softcap,
    cache_row,
    cache_head,
    mask_row,
    H,
    N,
    splits,
    size,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attention of a key head's queries over one part of the positions, with the logarithm of its sum."""
    let_next_start()
    wait_for_last()
    row, key_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    group = H // N
    member = tl.arange(0, BLOCK_G)
    head = key_head * group + member
    begin, end = bounds(length_ptr, split, splits, BLOCK_S)
    column, position = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    inside = column < size
    heads = (member < group)[:, None] & inside[None, :]
    query = tl.load(query_ptr + (row * H + head[:, None]) * size + column[None, :], mask=heads, other=0.0)
    first = row * cache_row + key_head.to(tl.int64) * cache_head

    best = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_G,), tl.float32)
    out = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for start in range(begin, end, BLOCK_S):
        here = start + position
        seen = here < end
        place = first + here[:, None].to(tl.int64) * size + column[None, :]
        tile = seen[:, None] & inside[None, :]
        key = tl.load(keys_ptr + place, mask=tile, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        value = tl.load(values_ptr + place, mask=tile, other=0.0)
        best, total, out = attend(
            scores, value, seen, mask_ptr, row * mask_row + here, softcap, best, total, out, MASKED, CAPPED
        )
    place = (row * H + head) * splits + split
    store_part(out_ptr, lse_ptr, place, column, size, member < group, inside, best, total, out)


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    norm_weights: tuple[torch.Tensor, torch.Tensor] | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float,
    eps: float,
    interleaved: bool,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention [B, H, d] of the new token of each row.

    query [B, H d], key and value [B, N d] as projected; `norm_weights` of query and key, [d] or [H d] and [N d]; cos
    and sin [B or 1, d]; mask [B or 1, S], true where a position may be seen. The cache takes key and value, and
    `length` grows by one.
    """
    rows, key_heads, _, size = keys.shape
    heads = query.shape[1] // size
    norm = 0 if norm_weights is None else 1 if norm_weights[0].numel() == size else 2
    turned = torch.empty(rows, heads, size, dtype=keys.dtype, device=keys.device)
    prepare_kernel[(rows, 2)](
        query,
        key,
        value,
        norm_weights and norm_weights[0],
        norm_weights and norm_weights[1],
        cos,
        sin,
        turned,
        keys,
        values,
        length,
        eps,
        cos.stride(0) if len(cos) > 1 else 0,
        keys.stride(0),
        keys.stride(1),
        heads,
        key_heads,
        size,
        NORM=norm,
        INTERLEAVED=interleaved,
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_N=triton.next_power_of_2(key_heads),
        HALF=triton.next_power_of_2(size // 2),
        num_warps=4,
        **OVERLAP,
    )
    parts, lse = room_for_parts(rows, heads, rows * key_heads, keys)
    splits = parts.shape[2]
    split_kernel[(rows, key_heads, splits)](
        turned,
        keys,
        values,
        mask,
        length,
        parts,
        lse,
        scale,
        softcap or 0.0,
        keys.stride(0),
        keys.stride(1),
        0 if mask is None or len(mask) == 1 else mask.stride(0),
        heads,
        key_heads,
        splits,
        size,
        MASKED=mask is not None,
        CAPPED=softcap is not None,
        BLOCK_G=max(16, triton.next_power_of_2(heads // key_heads)),
        BLOCK_S=step_of(keys),
        BLOCK_D=max(16, triton.next_power_of_2(size)),
        num_warps=WARPS,
        num_stages=STAGES,
        **OVERLAP,
    )
    out = torch.empty(rows, heads, size, dtype=keys.dtype, device=keys.device)
    sum_of_parts(parts, lse, out.transpose(0, 1), length)
    return out
