"""Multi-head, grouped-query and multi-query attention for few new tokens a row: one launch, of a long context two.

Shapes: B rows, Q new tokens of each, H query heads, N key heads, d head size, S positions of the cache. The cache has
keys and values [B, N, S, d], and on the device how many positions are filled. Several tokens of a row are as many rows
that share a cache, and that see those before them beside it.
"""

import torch
import triton
import triton.language as tl

from .overlap import OVERLAP, last_of, let_next_start, wait_for_last
from .parts import (
    FEW_PARTS,
    attend,
    bounds,
    capped,
    fetch_rows,
    number_of_parts,
    room_for_parts,
    step_of,
    store_part,
    sum_of_parts,
)

WARPS, STAGES = 8, 2


@triton.jit
def scale_of(vector_ptr, count, eps, BLOCK: tl.constexpr):
    """What RMSNorm multiplies all heads' values with."""
    place = tl.arange(0, BLOCK)
    x = tl.load(vector_ptr + place, mask=place < count, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, axis=0) / count + eps)


@triton.jit
def norm_halves(
    weight_ptr, head, real, size: tl.constexpr, NORM: tl.constexpr, INTERLEAVED: tl.constexpr, HALF: tl.constexpr
):
    """The halves [heads, HALF] of some heads' norm weights."""
    pair = tl.arange(0, HALF)
    step: tl.constexpr = 1 if INTERLEAVED else size // 2
    place = head[:, None] * (size if NORM == 2 else 0) + (2 if INTERLEAVED else 1) * pair[None, :]
    both = real[:, None] & (pair < size // 2)[None, :]
    a = tl.load(weight_ptr + place, mask=both, other=0.0).to(tl.float32)
    return a, tl.load(weight_ptr + place + step, mask=both, other=0.0).to(tl.float32)


@triton.jit
def turned(
    vector_ptr,
    norm_a,
    norm_b,
    cos_ptr,
    sin_ptr,
    head,
    real,
    count,
    eps,
    size: tl.constexpr,
    NORM: tl.constexpr,  # 0 none, 1 a head, 2 all heads
    INTERLEAVED: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_ALL: tl.constexpr,
    dtype: tl.constexpr,
):
    """The halves [heads, HALF] of some heads' vectors, normed and rotated."""
    half: tl.constexpr = size // 2
    step: tl.constexpr = 1 if INTERLEAVED else half
    pair = tl.arange(0, HALF)
    inside = pair < half
    both = real[:, None] & inside[None, :]
    place = head[:, None] * size + (2 if INTERLEAVED else 1) * pair[None, :]
    a = tl.load(vector_ptr + place, mask=both, other=0.0).to(tl.float32)
    b = tl.load(vector_ptr + place + step, mask=both, other=0.0).to(tl.float32)
    if NORM > 0:
        if NORM == 2:
            scale = scale_of(vector_ptr, count, eps, BLOCK_ALL)
        else:
            scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / size + eps)[:, None]
        a, b = (a * scale).to(dtype).to(tl.float32), (b * scale).to(dtype).to(tl.float32)
        a, b = (a * norm_a).to(dtype).to(tl.float32), (b * norm_b).to(dtype).to(tl.float32)
    cos_a = tl.load(cos_ptr + pair, mask=inside, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos_ptr + pair + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin_ptr + pair, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin_ptr + pair + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    return (a * cos_a - b * sin_a).to(dtype), (b * cos_b + a * sin_b).to(dtype)


@triton.jit
def attend_one(query_a, query_b, key_a, key_b, value, seen, scale, softcap, best, total, out, CAPPED: tl.constexpr):
    """`parts.attend` for one key, in halves as the queries [heads, HALF], and its value [d]."""
    scores = tl.sum(query_a.to(tl.float32) * key_a.to(tl.float32), axis=1)
    scores = (scores + tl.sum(query_b.to(tl.float32) * key_b.to(tl.float32), axis=1)) * scale
    if CAPPED:
        scores = capped(scores, softcap)
    scores = tl.where(seen, scores, float("-inf"))
    new_best = tl.maximum(best, scores)
    safe = tl.where(new_best == float("-inf"), 0.0, new_best)
    weight, shrink = tl.exp(scores - safe), tl.exp(best - safe)
    return new_best, total * shrink + weight, out * shrink[:, None] + weight[:, None] * value.to(tl.float32)[None, :]


@triton.jit
def cache_token(
    keys_ptr, values_ptr, key_a, key_b, value, size: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    """Write a key [1, HALF] in halves and a value to their place."""
    pair, column = tl.arange(0, HALF), tl.arange(0, BLOCK)
    half: tl.constexpr = size // 2
    tl.store(keys_ptr + pair[None, :], key_a, mask=(pair < half)[None, :])
    tl.store(keys_ptr + half + pair[None, :], key_b, mask=(pair < half)[None, :])
    tl.store(values_ptr + column, value, mask=column < size)


@triton.jit
def sum_few(
    parts_ptr,
    lse_ptr,
    place,
    column,
    size,
    heads,
    inside,
    PARTS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The weights' sum [heads] and the weighted sum [heads, BLOCK_D] of the parts that all programs have written."""
    logs, rows = (), ()
    for part in tl.static_range(PARTS):  # all are asked for before the first is used
        here = place * PARTS + part
        logs = logs + (tl.load(lse_ptr + here, mask=heads, other=float("-inf"), cache_modifier=".cg"),)  # noqa: RUF005
        row = parts_ptr + here[:, None] * size + column[None, :]
        both = heads[:, None] & inside[None, :]
        rows = rows + (tl.load(row, mask=both, other=0.0, cache_modifier=".cg"),)  # noqa: RUF005
    best = tl.zeros((BLOCK_G,), tl.float32) + logs[PARTS - 1]  # the new token's, which is seen
    for part in tl.static_range(PARTS):
        best = tl.maximum(best, logs[part])
    total = tl.zeros((BLOCK_G,), tl.float32)
    out = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for part in tl.static_range(PARTS):
        weight = tl.where(heads, tl.exp(logs[part] - best), 0.0)
        total += weight
        out += weight[:, None] * rows[part]
    return total, out


@triton.jit
def attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    query_weight_ptr,
    key_weight_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    mask_ptr,
    length_ptr,
    read_ptr,
    parts_ptr,
    lse_ptr,
    out_ptr,
    arrived_ptr,
    eps,
    scale,
    softcap,
    rotary_row,
    cache_row,
    cache_head,
    mask_row,
    mask_token,
    H,
    N,
    size: tl.constexpr,
    TOKENS: tl.constexpr,
    SPLITS: tl.constexpr,
    NEW: tl.constexpr,
    NORM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    MASKED: tl.constexpr,
    ENDS: tl.constexpr,
    CAPPED: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A key head's queries over one part of the positions; the NEWth has the new tokens, and writes its own.

    Rows may have ended, if ENDS: they attend to the new tokens alone.
    """
    let_next_start()
    item, key_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    row, token = item // TOKENS, item % TOKENS
    dtype: tl.constexpr = keys_ptr.dtype.element_ty
    half: tl.constexpr = size // 2
    first = row * cache_row + key_head.to(tl.int64) * cache_head
    length, group = tl.load(length_ptr), H // N  # of the step before, which has ended, as what it cached
    # Which rows go on was written before the step.
    begin, end = bounds(tl.where(tl.load(read_ptr + row) != 0, length, 0) if ENDS else length, split, SPLITS, BLOCK_S)
    fetch_rows(keys_ptr + first, begin, end, size, BLOCK_S)
    fetch_rows(values_ptr + first, begin, end, size, BLOCK_S)
    member, pair = tl.arange(0, BLOCK_G), tl.arange(0, HALF)
    head, ours, there = key_head * group + member, member < group, pair < half
    own, one = key_head + tl.arange(0, 1), tl.arange(0, 1) == 0
    norm_a, norm_b, key_norm_a, key_norm_b = 0.0, 0.0, 0.0, 0.0
    if NORM > 0:
        norm_a, norm_b = norm_halves(query_weight_ptr, head, ours, size, NORM, INTERLEAVED, HALF)
        key_norm_a, key_norm_b = norm_halves(key_weight_ptr, own, one, size, NORM, INTERLEAVED, HALF)
    wait_for_last()
    if MASKED:
        mask_ptr += row * mask_row + token * mask_token
    query_a, query_b = turned(
        query_ptr + item * H * size,
        norm_a,
        norm_b,
        cos_ptr + row * rotary_row + token * size,
        sin_ptr + row * rotary_row + token * size,
        head,
        ours,
        H * size,
        eps,
        size,
        NORM,
        INTERLEAVED,
        HALF,
        BLOCK_H,
        dtype,
    )
    column, position = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    inside = column < size

    best, total = tl.full((BLOCK_G,), float("-inf"), tl.float32), tl.zeros((BLOCK_G,), tl.float32)
    out = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    if split == NEW:
        for new in tl.static_range(TOKENS):
            if new <= token:
                key_a, key_b = turned(
                    key_ptr + (row * TOKENS + new) * N * size,
                    key_norm_a,
                    key_norm_b,
                    cos_ptr + row * rotary_row + new * size,
                    sin_ptr + row * rotary_row + new * size,
                    own,
                    one,
                    N * size,
                    eps,
                    size,
                    NORM,
                    INTERLEAVED,
                    HALF,
                    BLOCK_N,
                    dtype,
                )
                source = value_ptr + ((row * TOKENS + new) * N + key_head) * size
                value = tl.load(source + column, mask=inside, other=0.0)
                if new == token:
                    place = first + (length + new) * size
                    cache_token(keys_ptr + place, values_ptr + place, key_a, key_b, value, size, HALF, BLOCK_D)
                seen = new <= token
                if MASKED:
                    seen = (new == token) | (tl.load(mask_ptr + length + new) != 0)
                best, total, out = attend_one(
                    query_a, query_b, key_a, key_b, value, seen, scale, softcap, best, total, out, CAPPED
                )
    for start in range(begin, end, BLOCK_S):
        here = start + position
        seen = here < end
        place = first + here[:, None].to(tl.int64) * size
        both = seen[:, None] & there[None, :]
        key_a = tl.load(keys_ptr + place + pair[None, :], mask=both, other=0.0)
        key_b = tl.load(keys_ptr + place + half + pair[None, :], mask=both, other=0.0)
        scores = tl.dot(query_a, tl.trans(key_a), input_precision="ieee")
        scores = tl.dot(query_b, tl.trans(key_b), scores, input_precision="ieee") * scale
        value = tl.load(values_ptr + place + column[None, :], mask=seen[:, None] & inside[None, :], other=0.0)
        best, total, out = attend(scores, value, seen, mask_ptr, here, softcap, best, total, out, MASKED, CAPPED)
    place = item * H + head
    if NEW > 0:
        store_part(parts_ptr, lse_ptr, place * (NEW + 1) + split, column, size, ours, inside, best, total, out)
    ends = NEW == 0
    if SUMS and NEW > 0:
        ends = last_of(arrived_ptr + item * N + key_head, NEW + 1)
    if ends:
        if NEW > 0:
            total, out = sum_few(parts_ptr, lse_ptr, place, column, size, ours, inside, NEW + 1, BLOCK_G, BLOCK_D)
        out = out / tl.where(total > 0, total, 1.0)[:, None]
        target = out_ptr + place[:, None] * size + column[None, :]
        tl.store(target, out.to(dtype), mask=ours[:, None] & inside[None, :])


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
    unfinished: torch.Tensor | None,
    arrived: torch.Tensor,
    *,
    scale: float,
    eps: float,
    interleaved: bool,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention [B Q, H, d] of the new tokens of each row.

    query [B Q, H d], key and value [B Q, N d] as projected; `norm_weights` of query and key, [d] or [H d] and [N d];
    cos and sin [B or 1, Q, d]; mask [B or 1, Q, S], true where a position may be seen, a token's own taken to be;
    unfinished [B], false in rows of which nobody reads the result, which read nothing cached. The cache takes key and
    value; who calls counts the tokens in `length` afterwards. `arrived` [B Q N] int32 counts programs: zeros, as it is
    left.
    """
    _, key_heads, _, size = keys.shape
    rows, heads, tokens = len(query), query.shape[1] // size, cos.shape[1]
    norm = 0 if norm_weights is None else 1 if norm_weights[0].numel() == size else 2
    splits = number_of_parts(rows * key_heads, keys, 2 * step_of(keys))
    new = splits if splits > 1 else 0  # in a part of its own, beside the others
    parts, lse = room_for_parts(rows, heads, new + 1, keys)
    out = torch.empty(rows, heads, size, dtype=keys.dtype, device=keys.device)
    attention_kernel[(rows, key_heads, new + 1)](
        query,
        key,
        value,
        norm_weights and norm_weights[0],
        norm_weights and norm_weights[1],
        cos,
        sin,
        keys,
        values,
        mask,
        length,
        unfinished,
        parts,
        lse,
        out,
        arrived,
        eps,
        scale,
        softcap or 0.0,
        cos.stride(0) if len(cos) > 1 else 0,
        keys.stride(0),
        keys.stride(1),
        0 if mask is None or len(mask) == 1 else mask.stride(0),
        0 if mask is None else mask.stride(1),
        heads,
        key_heads,
        size,
        TOKENS=tokens,
        SPLITS=splits,
        NEW=new,
        NORM=norm,
        INTERLEAVED=interleaved,
        MASKED=mask is not None,
        ENDS=unfinished is not None,
        CAPPED=softcap is not None,
        SUMS=new < FEW_PARTS,
        BLOCK_G=max(16, triton.next_power_of_2(heads // key_heads)),
        BLOCK_S=step_of(keys),
        BLOCK_D=max(16, triton.next_power_of_2(size)),
        HALF=max(16, triton.next_power_of_2(size // 2)),
        BLOCK_H=triton.next_power_of_2(heads * size),
        BLOCK_N=triton.next_power_of_2(key_heads * size),
        num_warps=WARPS,
        num_stages=STAGES,
        **OVERLAP,
    )
    if new >= FEW_PARTS:
        sum_of_parts(parts, lse, out.transpose(0, 1))
    return out
