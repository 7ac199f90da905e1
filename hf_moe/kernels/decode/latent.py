"""Latent attention for few new tokens a row: three launches, of a long context or many rows four.

Shapes: B rows, Q new tokens of each, H heads, S positions of the cache, r = kv_lora_rank, d_nope and d_rope the sizes
of a key's parts. The cache has latents [B, 1, S, r] as keys, rotated keys [B, 1, S, d_rope] as values, and on the
device how many positions are filled.
"""

import torch
import triton
import triton.language as tl

from .norms import normalized
from .overlap import OVERLAP, let_next_start, wait_for_last
from .parts import (
    FEW_PARTS,
    attend,
    bounds,
    fetch_rows,
    number_of_parts,
    room_for_parts,
    step_of,
    store_part,
    sum_of_parts,
)
from .products import per_head

ABSORBED, VALUES = 64, 16  # columns of a program
STEP, WARPS, STAGES = 64, 4, 2  # positions of a step, warps, steps in flight
PROGRAMS = 256  # at once: nearly two a processor
FEW_ROWS = 2  # of more, one after the other, a program would sum the parts too slowly


@triton.jit
def rotated(vector_ptr, cos_ptr, sin_ptr, pair, rope: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The halves of a vector of RoPE, turned."""
    real = pair < rope // 2
    first = pair * 2 if INTERLEAVED else pair
    step = 1 if INTERLEAVED else rope // 2
    cos_a = tl.load(cos_ptr + pair, mask=real, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_ptr + pair + rope // 2, mask=real, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_ptr + pair, mask=real, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_ptr + pair + rope // 2, mask=real, other=0.0).to(tl.float32)
    a = tl.load(vector_ptr + first, mask=real, other=0.0).to(tl.float32)
    b = tl.load(vector_ptr + first + step, mask=real, other=0.0).to(tl.float32)
    return a * cos_a - b * sin_a, b * cos_b + a * sin_b


@triton.jit
def prepare(
    query_ptr,
    latent_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    query_rope_ptr,
    keys_ptr,
    values_ptr,
    eps,
    rank,
    FIRST,
    rope: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HALF: tl.constexpr,
):
    """Turn the RoPE part of a head's query; with the FIRST head norm the latent, too, turn the key's RoPE part and
    write both to the cache."""
    dtype: tl.constexpr = keys_ptr.dtype.element_ty
    pair, channel = tl.arange(0, HALF), tl.arange(0, BLOCK_R)
    turned, there = pair < rope // 2, channel < rank
    target = pair * 2 if PAIRED else pair
    step = 1 if PAIRED else rope // 2
    a, b = rotated(query_ptr, cos_ptr, sin_ptr, pair, rope, INTERLEAVED)
    tl.store(query_rope_ptr + target, a.to(dtype), mask=turned)
    tl.store(query_rope_ptr + target + step, b.to(dtype), mask=turned)
    if FIRST:
        latent = tl.load(latent_ptr + channel, mask=there, other=0.0)
        weight = tl.load(weight_ptr + channel, mask=there, other=0.0).to(tl.float32)
        tl.store(keys_ptr + channel, normalized(latent, weight, rank, eps, dtype), mask=there)
        a, b = rotated(latent_ptr + rank, cos_ptr, sin_ptr, pair, rope, INTERLEAVED)
        tl.store(values_ptr + target, a.to(dtype), mask=turned)
        tl.store(values_ptr + target + step, b.to(dtype), mask=turned)


@triton.jit
def absorb_kernel(
    query_ptr,
    latent_ptr,
    weight_ptr,
    key_up_ptr,
    cos_ptr,
    sin_ptr,
    absorbed_ptr,
    query_rope_ptr,
    keys_ptr,
    values_ptr,
    length_ptr,
    eps,
    query_row,
    query_head,
    latent_row,
    rotary_row,
    up_head,
    up_row,
    keys_row,
    values_row,
    rows,
    H,
    nope,
    rank,
    tokens,
    rope: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    HALF: tl.constexpr,
):
    """q·(W_UK c) = (W_UK^T q)·c: some columns of a head's query, moved to the latent's side by the up-projection.

    Behind a head's last columns a program for each new token: `prepare`.
    """
    let_next_start()
    head, block, blocks = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.cdiv(rank, BLOCK_C)
    dtype: tl.constexpr = keys_ptr.dtype.element_ty
    row, depth = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_A)
    column = block * BLOCK_C + tl.arange(0, BLOCK_C)
    real, deep, inside = row < rows, depth < nope, column < rank
    place = key_up_ptr + head * up_head + depth[:, None] * up_row + column[None, :]
    key_up = tl.load(place, mask=deep[:, None] & inside[None, :], other=0.0)
    wait_for_last()
    if block < blocks:
        query = query_ptr + head * query_head + row[:, None].to(tl.int64) * query_row + depth[None, :]
        query = tl.load(query, mask=real[:, None] & deep[None, :], other=0.0)
        absorbed = tl.dot(query, key_up, input_precision="ieee").to(dtype)
        target = absorbed_ptr + (head * rows + row[:, None]) * rank + column[None, :]
        tl.store(target, absorbed, mask=real[:, None] & inside[None, :])
    else:
        one = tl.zeros((), tl.int64) + block - blocks
        cache, token = one // tokens, one % tokens
        length, turn = tl.load(length_ptr) + token, cache * rotary_row + token * rope
        prepare(
            query_ptr + one * query_row + head * query_head + nope,
            latent_ptr + one * latent_row,
            weight_ptr,
            cos_ptr + turn,
            sin_ptr + turn,
            query_rope_ptr + (one * H + head) * rope,
            keys_ptr + cache * keys_row + length * rank,
            values_ptr + cache * values_row + length * rope,
            eps,
            rank,
            head == 0,
            rope,
            INTERLEAVED,
            PAIRED,
            BLOCK_R,
            HALF,
        )


@triton.jit
def split_kernel(
    query_ptr,
    query_rope_ptr,
    keys_ptr,
    values_ptr,
    mask_ptr,
    length_ptr,
    read_ptr,
    out_ptr,
    lse_ptr,
    scale,
    softcap,
    query_head,
    query_row,
    keys_row,
    values_row,
    mask_row,
    mask_token,
    H,
    splits,
    rank,
    rope,
    tokens,
    MASKED: tl.constexpr,
    ENDS: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Attention of BLOCK_H heads of a row over one part of the positions, with the logarithm of its sum.

    Rows may have ended, if ENDS: they attend to the first position alone.
    """
    let_next_start()
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(2)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    cache, token = row // tokens, row % tokens
    length = tl.load(length_ptr) + token + 1  # itself, just written, included
    if ENDS:  # written before the step
        length = tl.where(tl.load(read_ptr + cache) != 0, length, 1)
    begin, end = bounds(length, split, splits, BLOCK_S)
    fetch_rows(keys_ptr + cache * keys_row, begin, end, rank, BLOCK_S)
    wait_for_last()
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
            keys_ptr + cache * keys_row + here[:, None].to(tl.int64) * rank + column[None, :],
            mask=seen[:, None] & inside[None, :],
            other=0.0,
        )
        key = tl.load(
            values_ptr + cache * values_row + here[None, :].to(tl.int64) * rope + turned[:, None],
            mask=seen[None, :] & real[:, None],
            other=0.0,
        )
        scores = tl.dot(query, tl.trans(latent), input_precision="ieee")
        scores = tl.dot(query_rope, key, scores, input_precision="ieee") * scale
        place = cache * mask_row + token * mask_token + here
        best, total, out = attend(scores, latent, seen, mask_ptr, place, softcap, best, total, out, MASKED, CAPPED)
    place = (row * H + head) * splits + split
    store_part(out_ptr, lse_ptr, place, column, rank, heads, inside, best, total, out)


@triton.jit
def value_kernel(
    parts_ptr,
    lse_ptr,
    value_up_ptr,
    out_ptr,
    up_head,
    up_row,
    rows,
    H,
    rank,
    size,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The parts' sum, as `parts.combine_kernel` has it, and of a head's the values of some columns."""
    let_next_start()
    head, part, channel = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    real, there, inside = part < SPLITS, channel < rank, column < size
    place = value_up_ptr + head * up_head + column[:, None] * up_row + channel[None, :]
    value_up = tl.load(place, mask=inside[:, None] & there[None, :], other=0.0)
    wait_for_last()
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    for row in range(0, rows):
        first = (row * H + head) * SPLITS
        lse = tl.load(lse_ptr + first + part, mask=real, other=float("-inf"))
        rows_of_parts = parts_ptr + (first + part[:, None]) * rank + channel[None, :]
        latents = tl.load(rows_of_parts, mask=real[:, None] & there[None, :], other=0.0)
        best = tl.max(lse, axis=0)
        weight = tl.exp(lse - tl.where(best == float("-inf"), 0.0, best))
        latent = tl.sum(latents * weight[:, None], axis=0) / tl.maximum(tl.sum(weight, axis=0), 1e-30)
        value = tl.sum(latent.to(dtype).to(tl.float32)[None, :] * value_up.to(tl.float32), axis=1)
        tl.store(out_ptr + (row * H + head) * size + column, value.to(dtype), mask=inside)


def latent_attention(
    query: torch.Tensor,
    latent: torch.Tensor,
    norm_weight: torch.Tensor,
    key_up: torch.Tensor,
    value_up: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    mask: torch.Tensor | None,
    unfinished: torch.Tensor | None,
    *,
    scale: float,
    eps: float,
    interleaved: bool,
    paired: bool = False,
    softcap: float | None = None,
) -> torch.Tensor:
    """sum_s p_s W_UV c_s of the new tokens of each row: [B Q, H, d_v].

    query [B Q, H, d_nope + d_rope] and latent [B Q, r + d_rope] as projected, not normed, not rotated; key_up
    [H, d_nope, r]; value_up [H, d_v, r]; cos and sin [B or 1, Q, d_rope]; mask [B or 1, Q, S], true where a position
    may be seen; unfinished [B], false in rows of which nobody reads the result, which attend to one position. The
    cache takes the tokens; who calls counts them in `length` afterwards. Where pairs are `interleaved`, turned ones
    stay so if `paired`, as DeepSeek-V2's in Transformers; else the first of all pairs come before the second.
    """
    (rows, heads, _), tokens = query.shape, cos.shape[1]
    rank, rope, nope, size = keys.shape[-1], values.shape[-1], key_up.shape[1], value_up.shape[1]
    query_rope = torch.empty(rows, heads, rope, dtype=keys.dtype, device=keys.device)
    absorbed = torch.empty(heads, rows, rank, dtype=keys.dtype, device=keys.device)
    block_r, block_p = triton.next_power_of_2(rank), triton.next_power_of_2(rope)
    block_c = max(16, min(ABSORBED, block_r))
    absorb_kernel[(heads, triton.cdiv(rank, block_c) + rows)](
        query,
        latent,
        norm_weight,
        key_up,
        cos,
        sin,
        absorbed,
        query_rope,
        keys,
        values,
        length,
        eps,
        query.stride(0),
        query.stride(1),
        latent.stride(0),
        cos.stride(0) if len(cos) > 1 else 0,
        key_up.stride(0),
        key_up.stride(1),
        keys.stride(0),
        values.stride(0),
        rows,
        heads,
        nope,
        rank,
        tokens,
        rope,
        INTERLEAVED=interleaved,
        PAIRED=paired,
        BLOCK_T=max(16, triton.next_power_of_2(rows)),
        BLOCK_A=max(16, triton.next_power_of_2(nope)),
        BLOCK_C=block_c,
        BLOCK_R=block_r,
        HALF=max(1, block_p // 2),
        num_warps=4,
        **OVERLAP,
    )

    block_h = min(64, max(16, triton.next_power_of_2(heads)))
    blocks_h = triton.cdiv(heads, block_h)
    step = step_of(keys, STEP)
    splits = number_of_parts(rows * blocks_h, keys, step, PROGRAMS)
    parts, lse = room_for_parts(rows, heads, splits, keys)
    split_kernel[(rows, blocks_h, splits)](
        absorbed,
        query_rope,
        keys,
        values,
        mask,
        length,
        unfinished,
        parts,
        lse,
        scale,
        softcap or 0.0,
        absorbed.stride(0),
        absorbed.stride(1),
        keys.stride(0),
        values.stride(0),
        0 if mask is None or len(mask) == 1 else mask.stride(0),
        0 if mask is None else mask.stride(1),
        heads,
        splits,
        rank,
        rope,
        tokens,
        MASKED=mask is not None,
        ENDS=unfinished is not None,
        CAPPED=softcap is not None,
        BLOCK_H=block_h,
        BLOCK_S=step,
        BLOCK_R=block_r,
        BLOCK_P=max(16, block_p),
        num_warps=WARPS if block_h == 16 else 8,
        num_stages=STAGES,
        **OVERLAP,
    )
    out = torch.empty(rows, heads, size, dtype=keys.dtype, device=keys.device)
    if splits > FEW_PARTS or rows > FEW_ROWS:
        latents = torch.empty_like(absorbed)
        sum_of_parts(parts, lse, latents)
        per_head(latents, value_up.transpose(1, 2), out.transpose(0, 1))
        return out
    value_kernel[(heads, triton.cdiv(size, VALUES))](
        parts,
        lse,
        value_up,
        out,
        value_up.stride(0),
        value_up.stride(1),
        rows,
        heads,
        rank,
        size,
        SPLITS=splits,
        BLOCK_N=triton.next_power_of_2(splits),
        BLOCK_R=block_r,
        BLOCK_C=VALUES,
        num_warps=4,
        **OVERLAP,
    )
    return out
