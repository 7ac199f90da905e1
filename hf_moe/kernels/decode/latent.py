"""Latent attention for one new token a row: five launches, whatever the context.

Shapes: B rows, H heads, S positions of the cache, r = kv_lora_rank, d_nope and d_rope the sizes of a key's parts. The
cache has latents [B, 1, S, r] as keys, rotated keys [B, 1, S, d_rope] as values, and on the device how many positions
are filled.
"""

import torch
import triton
import triton.language as tl

from .overlap import OVERLAP, let_next_start, wait_for_last
from .parts import STAGES, WARPS, attend, bounds, room_for_parts, step_of, store_part, sum_of_parts
from .products import per_head


@triton.jit
def prepare_kernel(
    query_ptr,
    latent_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    query_rope_ptr,
    keys_ptr,
    values_ptr,
    length_ptr,
    eps,
    query_row,
    query_head,
    nope,
    latent_row,
    rotary_row,
    keys_row,
    values_row,
    H,
    rank,
    rope: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HALF: tl.constexpr,
):
    """Norm the latent, rotate the query's and the key's RoPE part, write latent and key to the cache's next place."""
    let_next_start()
    wait_for_last()
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(length_ptr)
    dtype = keys_ptr.dtype.element_ty

    column = tl.arange(0, BLOCK_R)
    inside = column < rank
    latent = tl.load(latent_ptr + row * latent_row + column, mask=inside, other=0.0).to(tl.float32)
    normed = latent * tl.rsqrt(tl.sum(latent * latent, axis=0) / rank + eps)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    normed = normed.to(dtype).to(tl.float32) * weight
    tl.store(keys_ptr + row * keys_row + length * rank + column, normed.to(dtype), mask=inside)

    pair = tl.arange(0, HALF)
    real = pair < rope // 2
    first = pair * 2 if INTERLEAVED else pair
    step = 1 if INTERLEAVED else rope // 2
    out_first = pair * 2 if PAIRED else pair
    out_step = 1 if PAIRED else rope // 2
    turn = row * rotary_row + pair
    cos_a = tl.load(cos_ptr + turn, mask=real, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_ptr + turn + rope // 2, mask=real, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_ptr + turn, mask=real, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_ptr + turn + rope // 2, mask=real, other=0.0).to(tl.float32)

    key = latent_ptr + row * latent_row + rank + first
    a = tl.load(key, mask=real, other=0.0).to(tl.float32)
    b = tl.load(key + step, mask=real, other=0.0).to(tl.float32)
    place = values_ptr + row * values_row + length * rope + out_first
    tl.store(place, (a * cos_a - b * sin_a).to(dtype), mask=real)
    tl.store(place + out_step, (b * cos_b + a * sin_b).to(dtype), mask=real)

    head = tl.arange(0, BLOCK_H)
    both = (head < H)[:, None] & real[None, :]
    query = query_ptr + row * query_row + head[:, None] * query_head + nope + first[None, :]
    a = tl.load(query, mask=both, other=0.0).to(tl.float32)
    b = tl.load(query + step, mask=both, other=0.0).to(tl.float32)
    place = query_rope_ptr + (row * H + head[:, None]) * rope + out_first[None, :]
    tl.store(place, (a * cos_a[None, :] - b * sin_a[None, :]).to(dtype), mask=both)
    tl.store(place + out_step, (b * cos_b[None, :] + a * sin_b[None, :]).to(dtype), mask=both)


@triton.jit
def split_kernel(
    query_ptr,
    query_rope_ptr,
    keys_ptr,
    values_ptr,
    mask_ptr,
    length_ptr,
    out_ptr,
    lse_ptr,
    scale,
    softcap,
    query_head,
    query_row,
    keys_row,
    values_row,
    mask_row,
    H,
    splits,
    rank,
    rope,
    MASKED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Attention of BLOCK_H heads of a row over one part of the positions, with the logarithm of its sum."""
    let_next_start()
    wait_for_last()
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    begin, end = bounds(length_ptr, split, splits, BLOCK_S)
    column, turned, position = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_S)
    heads, inside, real = head < H, column < rank, turned < rope
    query = tl.load(
        query_ptr + head[:, None] * query_head + row * query_row + column[None, :],
        mask=heads[:, None] & inside[None, :],
        other=0.0,
    )
    query_rope = tl.load(
        query_rope_ptr + (row * H + head[:, None]) * rope + turned[None, :],
        mask=heads[:, None] & real[None, :],
        other=0.0,
    )
    best = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    out = tl.zeros((BLOCK_H, BLOCK_R), tl.float32)
    for start in range(begin, end, BLOCK_S):
        here = start + position
        seen = here < end
        latent = tl.load(
            keys_ptr + row * keys_row + here[:, None].to(tl.int64) * rank + column[None, :],
            mask=seen[:, None] & inside[None, :],
            other=0.0,
        )
        key = tl.load(
            values_ptr + row * values_row + here[None, :].to(tl.int64) * rope + turned[:, None],
            mask=seen[None, :] & real[:, None],
            other=0.0,
        )
        scores = tl.dot(query, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(query_rope, key, scores, input_precision="ieee") * scale
        best, total, out = attend(
            scores, latent, seen, mask_ptr, row * mask_row + here, softcap, best, total, out, MASKED, CAPPED
        )
    place = (row * H + head) * splits + split
    store_part(out_ptr, lse_ptr, place, column, rank, heads, inside, best, total, out)


def latent_attention(
    query: torch.Tensor,
    latent: torch.Tensor,
    norm_weight: torch.Tensor,
    key_up: torch.Tensor,
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
    paired: bool = False,
    softcap: float | None = None,
) -> torch.Tensor:
    """sum_s p_s c_s of the new token of each row: [H, B, r], which the value projection follows.

    query [B, H, d_nope + d_rope] and latent [B, r + d_rope] as projected, not normed, not rotated; key_up
    [H, d_nope, r]; cos and sin [B or 1, d_rope]; mask [B or 1, S], true where a position may be seen. The cache takes
    the token, and `length` grows by one. Where pairs are `interleaved`, rotated ones stay so if `paired`, as
    DeepSeek-V2's in Transformers; else the first of all pairs come before the second.
    """
    rows, heads, _ = query.shape
    rank, rope, nope = keys.shape[-1], values.shape[-1], key_up.shape[1]
    query_rope = torch.empty(rows, heads, rope, dtype=keys.dtype, device=keys.device)
    block_r, block_p = triton.next_power_of_2(rank), triton.next_power_of_2(rope)
    prepare_kernel[(rows,)](
        query,
        latent,
        norm_weight,
        cos,
        sin,
        query_rope,
        keys,
        values,
        length,
        eps,
        query.stride(0),
        query.stride(1),
        nope,
        latent.stride(0),
        cos.stride(0) if len(cos) > 1 else 0,
        keys.stride(0),
        values.stride(0),
        heads,
        rank,
        rope,
        INTERLEAVED=interleaved,
        PAIRED=paired,
        BLOCK_H=triton.next_power_of_2(heads),
        BLOCK_R=block_r,
        HALF=max(1, block_p // 2),
        num_warps=4,
        **OVERLAP,
    )
    # q·(W_UK c) = (W_UK^T q)·c: one small product a head moves the up-projection to the query.
    absorbed = torch.empty(heads, rows, rank, dtype=keys.dtype, device=keys.device)
    per_head(query[..., :nope].transpose(0, 1), key_up, absorbed)

    block_h = min(64, max(16, triton.next_power_of_2(heads)))
    blocks_h = triton.cdiv(heads, block_h)
    parts, lse = room_for_parts(rows, heads, rows * blocks_h, keys)
    splits = parts.shape[2]
    split_kernel[(rows, blocks_h, splits)](
        absorbed,
        query_rope,
        keys,
        values,
        mask,
        length,
        parts,
        lse,
        scale,
        softcap or 0.0,
        absorbed.stride(0),
        absorbed.stride(1),
        keys.stride(0),
        values.stride(0),
        0 if mask is None or len(mask) == 1 else mask.stride(0),
        heads,
        splits,
        rank,
        rope,
        MASKED=mask is not None,
        CAPPED=softcap is not None,
        BLOCK_H=block_h,
        BLOCK_S=step_of(keys),
        BLOCK_R=block_r,
        BLOCK_P=max(16, block_p),
        num_warps=WARPS if block_h == 16 else 8,
        num_stages=STAGES,
        **OVERLAP,
    )
    out = torch.empty_like(absorbed)
    sum_of_parts(parts, lse, out, length)
    return out
