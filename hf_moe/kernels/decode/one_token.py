"""The products of a single token: as fast as weights are read, by programs so small that many wait side by side.

A program holds its few rows of weights in registers and has asked for them before it waits for the launch before it:
while that ends, the next one's weights are under way. Of experts, the second product can do so, since it knows the
choice by then. Tensor cores would take 16 tokens, and shared memory that keeps the next launch's programs out.
Experts' weights, which the next token hardly needs, leave the card's cache first: what was fetched ahead stays.

Shapes: A depth, C columns, D hidden size, I expert intermediate size, E experts, K experts of the token, P parts of a
shared network.
"""

import torch
import triton
import triton.language as tl

from ..activations import ACTIVATIONS, activate
from ..formula import Formula
from .overlap import OVERLAP, let_next_start, wait_for_last

TILE, WARPS = 4096, 2  # weights that a program holds, and its warps
SUM_COLUMNS, SUM_WARPS = 1, 4  # of the sum of experts
MAX_SLOTS = 16  # whose weights it can hold


@triton.jit
def norm_scale(x, size, eps):
    return tl.rsqrt(tl.sum(x * x, axis=0) / size + eps)


@triton.jit
def product_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    weight2_ptr,
    out2_ptr,
    weight3_ptr,
    out3_ptr,
    norm_ptr,
    eps,
    depth,
    columns,
    columns2,
    columns3,
    count_ptr,
    WEIGHTS: tl.constexpr,
    NORMED: tl.constexpr,
    COUNTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Some columns of one of up to three products of x [A], or of its RMSNorm."""
    let_next_start()
    block, step = tl.program_id(0), tl.arange(0, BLOCK_A)
    weight, out, width = weight_ptr, out_ptr, columns
    if WEIGHTS > 1:  # noqa: SIM102
        if block >= tl.cdiv(columns, BLOCK_C):
            block -= tl.cdiv(columns, BLOCK_C)
            weight, out, width = weight2_ptr, out2_ptr, columns2
            if WEIGHTS > 2:  # noqa: SIM102
                if block >= tl.cdiv(columns2, BLOCK_C):
                    block -= tl.cdiv(columns2, BLOCK_C)
                    weight, out, width = weight3_ptr, out3_ptr, columns3
    column = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < width
    place = weight + column[:, None].to(tl.int64) * depth + step[None, :]
    tile = tl.load(place, mask=inside[:, None] & (step < depth)[None, :], other=0.0)
    scale = tl.zeros((1,), tl.float32)
    if NORMED:
        norm = tl.load(norm_ptr + step, mask=step < depth, other=0.0)
    wait_for_last()
    if COUNTS:  # noqa: SIM102
        if tl.program_id(0) == 0:
            tl.store(count_ptr, tl.load(count_ptr) + 1)
    x = tl.load(x_ptr + step, mask=step < depth, other=0.0)
    if NORMED:  # of one tile
        scale = norm_scale(x.to(tl.float32), depth, eps)
        x = ((x.to(tl.float32) * scale).to(x.dtype).to(tl.float32) * norm.to(tl.float32)).to(x.dtype)
    total = tl.sum(x.to(tl.float32)[None, :] * tile.to(tl.float32), axis=1)
    for start in range(BLOCK_A, depth, BLOCK_A):
        here = step + start < depth
        x = tl.load(x_ptr + start + step, mask=here, other=0.0)
        tile = tl.load(place + start, mask=inside[:, None] & here[None, :], other=0.0)
        total += tl.sum(x.to(tl.float32)[None, :] * tile.to(tl.float32), axis=1)
    tl.store(out + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def sizes(depth: int, rows: int = 1) -> dict[str, int]:
    """How a program's tile is cut, `rows` of it for each column."""
    block = min(TILE, triton.next_power_of_2(depth))
    return {"BLOCK_C": max(1, TILE // block // rows), "BLOCK_A": block, "num_warps": WARPS}


def linear(
    x: torch.Tensor,
    weights: tuple[torch.Tensor, ...],
    norm: tuple[torch.Tensor, float] | None,
    counted: torch.Tensor | None,
) -> list[torch.Tensor]:
    """x W^T [1, C] for each of one to three weights [C, A], of x [1, A] or its norm, whose depth a tile must hold.

    `counted` grows by one.
    """
    depth, columns, cut = x.shape[1], [len(weight) for weight in weights], sizes(x.shape[1])
    outs = [torch.empty(1, size, dtype=x.dtype, device=x.device) for size in columns]
    missing = [None] * (3 - len(weights))
    pairs = [y for pair in zip([*weights, *missing], outs + missing, strict=True) for y in pair]
    norm_weight, eps = norm or (None, 0.0)
    product_kernel[(sum(triton.cdiv(size, cut["BLOCK_C"]) for size in columns),)](
        x,
        *pairs,
        norm_weight,
        eps,
        depth,
        *(columns + [0] * len(missing)),
        counted,
        WEIGHTS=len(weights),
        NORMED=norm is not None,
        COUNTS=counted is not None,
        **cut,
        **OVERLAP,
    )
    return outs


@triton.jit
def up_kernel(
    x_ptr,
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    shared_gate_ptr,
    shared_up_ptr,
    index_ptr,
    out_ptr,
    num_experts,
    expert_stride,
    bias_stride,
    shared_width,
    D,
    I,  # noqa: E741
    parts,
    ROUTED: tl.constexpr,
    SHARED: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Some columns of a shared part, of which there are P first, or of the expert of a slot."""
    program, step = tl.program_id(0), tl.arange(0, BLOCK_A)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    wait_for_last()
    let_next_start()  # only now: the next one needs `index` before it waits
    width, up = I, up_ptr
    gate = gate_ptr if GATED else up_ptr
    expert = tl.zeros((), tl.int64)
    if ROUTED:
        expert += tl.load(index_ptr + tl.maximum(program - parts, 0))
        width = tl.where(expert < num_experts, I, 0)  # that of another rank
        up, gate = up + expert * expert_stride, gate + expert * expert_stride
    if SHARED:  # noqa: SIM102
        if program < parts:
            width = tl.minimum(I, shared_width - program * I)
            up = shared_up_ptr + program.to(tl.int64) * I * D
            gate = (shared_gate_ptr if GATED else shared_up_ptr) + program.to(tl.int64) * I * D
    inside = column < width
    place = column[:, None].to(tl.int64) * D + step[None, :]
    of_up, of_gate = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, D, BLOCK_A):
        here = step + start < D
        both = inside[:, None] & here[None, :]
        tile = tl.load(up + place + start, mask=both, other=0.0, eviction_policy="evict_first")
        if GATED:
            gate_tile = tl.load(gate + place + start, mask=both, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + start + step, mask=here, other=0.0).to(tl.float32)[None, :]
        of_up += tl.sum(x * tile.to(tl.float32), axis=1)
        if GATED:
            of_gate += tl.sum(x * gate_tile.to(tl.float32), axis=1)
    if BIASED:
        biased = column < tl.where(program >= parts, width, 0)
        of_up += tl.load(up_bias_ptr + expert * bias_stride + column, mask=biased, other=0.0).to(tl.float32)
        if GATED:
            of_gate += tl.load(gate_bias_ptr + expert * bias_stride + column, mask=biased, other=0.0).to(tl.float32)
    hidden, _, _ = activate(of_gate if GATED else of_up, of_up, ACTIVATION, GATED, LIMIT, SHIFT)
    # Zero where there is nothing, so that the next launch need not know where that is.
    tl.store(
        out_ptr + program * I + column, tl.where(inside, hidden, 0.0).to(out_ptr.dtype.element_ty), mask=column < I
    )


@triton.jit
def sum_kernel(
    hidden_ptr,
    down_ptr,
    bias_ptr,
    shared_down_ptr,
    index_ptr,
    weights_ptr,
    residual_ptr,
    out_ptr,
    num_experts,
    expert_stride,
    shared_width,
    D,
    I,  # noqa: E741
    K: tl.constexpr,
    PARTS: tl.constexpr,
    BIASED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Some columns of the down-projections of all parts and slots, weighted, and their sum."""
    let_next_start()
    column, step = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_A)
    inside = column < D
    stride = tl.multiple_of(shared_width, 16) if ALIGNED else shared_width
    tiles = ()
    for part in tl.static_range(PARTS):
        here = inside[:, None] & (step < tl.minimum(I, shared_width - part * I))[None, :]
        place = shared_down_ptr + part * I + column[:, None].to(tl.int64) * stride + step[None, :]
        tiles = tiles + (tl.load(place, mask=here, other=0.0),)  # noqa: RUF005
    for slot in tl.static_range(K):
        expert = tl.load(index_ptr + slot)
        width = tl.where(expert < num_experts, I, 0)
        here = inside[:, None] & (step < width)[None, :]
        place = down_ptr + expert * expert_stride + column[:, None].to(tl.int64) * I + step[None, :]
        tiles = tiles + (tl.load(place, mask=here, other=0.0, eviction_policy="evict_first"),)  # noqa: RUF005
    wait_for_last()
    products, total = tl.zeros((BLOCK_C, BLOCK_A), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for slot in tl.static_range(PARTS + K):
        hidden = tl.load(hidden_ptr + slot * I + step, mask=step < I, other=0.0).to(tl.float32)
        if slot >= PARTS:
            weight = tl.load(weights_ptr + slot - PARTS).to(tl.float32)
            hidden *= weight
            if BIASED:
                expert = tl.load(index_ptr + slot - PARTS)
                biased = column < tl.where(expert < num_experts, D, 0)
                total += weight * tl.load(bias_ptr + expert * D + column, mask=biased, other=0.0).to(tl.float32)
        products += hidden[None, :] * tiles[slot].to(tl.float32)
    total += tl.sum(products, axis=1)
    total = total.to(out_ptr.dtype.element_ty)
    if ADDS:
        residual = tl.load(residual_ptr + column, mask=inside, other=0.0).to(tl.float32)
        total = (total.to(tl.float32) + residual).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + column, total, mask=inside)


def mixture(x, weights, index, routed, shared, formula: Formula, residual, size: int, parts: int) -> torch.Tensor:
    """`experts.mixture` of one token, `parts` parts of `size`."""
    dim, top_k, one, other = x.shape[1], 0 if routed is None else index.shape[1], routed or shared, shared or routed
    width = 0 if shared is None else shared.up.shape[1]
    gate_bias, up_bias, down_bias = one.biases or (None, None, None)
    hidden = torch.empty(parts + top_k, size, dtype=x.dtype, device=x.device)
    cut = sizes(dim, 1 if one.gate is None else 2)
    experts = 0 if routed is None else len(routed.up)
    up_kernel[(parts + top_k, triton.cdiv(size, cut["BLOCK_C"]))](
        x,
        one.gate,
        one.up,
        gate_bias,
        up_bias,
        other.gate,
        other.up,
        index,
        hidden,
        experts,
        one.up.stride(0),
        0 if up_bias is None else up_bias.stride(0),
        width,
        dim,
        size,
        parts,
        ROUTED=routed is not None,
        SHARED=shared is not None,
        GATED=one.gate is not None,
        BIASED=one.biases is not None,
        ACTIVATION=ACTIVATIONS[formula.activation],
        LIMIT=formula.limit,
        SHIFT=formula.shift,
        **cut,
        **OVERLAP,
    )
    out = torch.empty(1, dim, dtype=x.dtype, device=x.device)
    sum_kernel[(triton.cdiv(dim, SUM_COLUMNS),)](
        hidden,
        one.down,
        down_bias,
        other.down,
        index,
        weights,
        residual,
        out,
        experts,
        one.down.stride(0),
        width,
        dim,
        size,
        K=top_k,
        PARTS=parts,
        BIASED=one.biases is not None,
        ALIGNED=size % 16 == 0 and width % 16 == 0,
        ADDS=residual is not None,
        BLOCK_C=SUM_COLUMNS,
        BLOCK_A=triton.next_power_of_2(size),
        num_warps=SUM_WARPS,
        **OVERLAP,
    )
    return out
