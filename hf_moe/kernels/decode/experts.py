"""Experts for few tokens: each chosen expert's weights are read once, and nothing else of them.

Shapes: T tokens, D hidden size, I expert intermediate size, E experts, K experts per token. Up to 64 tokens fit one
tile of a matrix product, so nothing is sorted: the program of an expert reads the tokens that chose it and leaves the
others' rows alone. Sums have a fixed order.
"""

import torch
import triton
import triton.language as tl

MAX_TOKENS = 64  # one tile of rows; with more, sorting by expert is cheaper
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "relu": 3}  # by number: Triton has no names at run time


@triton.jit
def activate(x, ACT: tl.constexpr):
    if ACT == 0:
        return x * tl.sigmoid(x)
    if ACT == 1:
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACT == 2:
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return tl.maximum(x, 0.0)


@triton.jit
def taken_slots(index_ptr, tokens, top_k, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BY_SLOT: tl.constexpr):
    """This program's expert, the slot of each token [BLOCK_T] that chose it, whether it did, and if it is ours.

    By slot: the expert of slot `program_id(0)`, ours if no earlier slot has it. Otherwise expert `program_id(0)`.
    """
    row, slot = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_K)
    places = row[:, None] * top_k + slot[None, :]
    index = tl.load(index_ptr + places, mask=(row[:, None] < tokens) & (slot[None, :] < top_k), other=-1)
    expert = tl.load(index_ptr + tl.program_id(0)) if BY_SLOT else tl.program_id(0).to(tl.int64)
    hit = index == expert
    taken = tl.max(hit.to(tl.int32), axis=1) > 0
    place = tl.max(tl.where(hit, places, 0), axis=1)
    if BY_SLOT:
        ours = tl.min(tl.where(hit, places, tokens * top_k)) == tl.program_id(0)
    else:
        ours = tl.max(taken.to(tl.int32), axis=0) > 0
    return expert, place, taken, ours


@triton.jit
def up_kernel(
    x_ptr,
    gate_ptr,
    up_ptr,
    gate_bias_ptr,
    up_bias_ptr,
    index_ptr,
    out_ptr,
    tokens,
    num_experts,
    expert_stride,
    row_stride,
    bias_stride,
    D,
    I,  # noqa: E741
    K,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    ACT: tl.constexpr,
    BY_SLOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    expert, place, taken, ours = taken_slots(index_ptr, tokens, K, BLOCK_T, BLOCK_K, BY_SLOT)
    if ours & (expert < num_experts):
        row, column, depth = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_D)
        column += tl.program_id(1) * BLOCK_I
        inside = column < I
        weight = expert * expert_stride + column[None, :].to(tl.int64) * row_stride + depth[:, None]
        up = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
        gate = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
        for start in range(0, D, BLOCK_D):
            here = depth + start < D
            tile = here[:, None] & inside[None, :]
            x = tl.load(
                x_ptr + row[:, None] * D + (depth + start)[None, :], mask=taken[:, None] & here[None, :], other=0.0
            )
            up = tl.dot(x, tl.load(up_ptr + weight + start, mask=tile, other=0.0), up, input_precision="ieee")
            if GATED:
                gate = tl.dot(
                    x, tl.load(gate_ptr + weight + start, mask=tile, other=0.0), gate, input_precision="ieee"
                )
        if BIASED:
            up += tl.load(up_bias_ptr + expert * bias_stride + column, mask=inside, other=0.0).to(tl.float32)[None, :]
            if GATED:
                bias = tl.load(gate_bias_ptr + expert * bias_stride + column, mask=inside, other=0.0)
                gate += bias.to(tl.float32)[None, :]
        hidden = activate(gate, ACT) * up if GATED else activate(up, ACT)
        out = out_ptr + place[:, None] * I + column[None, :]
        tl.store(out, hidden.to(out_ptr.dtype.element_ty), mask=taken[:, None] & inside[None, :])


@triton.jit
def down_kernel(
    hidden_ptr,
    down_ptr,
    bias_ptr,
    index_ptr,
    out_ptr,
    tokens,
    num_experts,
    expert_stride,
    row_stride,
    D,
    I,  # noqa: E741
    K,
    BIASED: tl.constexpr,
    BY_SLOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    expert, place, taken, ours = taken_slots(index_ptr, tokens, K, BLOCK_T, BLOCK_K, BY_SLOT)
    if ours & (expert < num_experts):
        column, depth = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_I)
        inside = column < D
        weight = expert * expert_stride + column[None, :].to(tl.int64) * row_stride + depth[:, None]
        out = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for start in range(0, I, BLOCK_I):
            here = depth + start < I
            hidden = tl.load(
                hidden_ptr + place[:, None] * I + (depth + start)[None, :],
                mask=taken[:, None] & here[None, :],
                other=0.0,
            )
            tile = tl.load(down_ptr + weight + start, mask=here[:, None] & inside[None, :], other=0.0)
            out = tl.dot(hidden, tile, out, input_precision="ieee")
        if BIASED:
            out += tl.load(bias_ptr + expert * D + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        place = out_ptr + place[:, None] * D + column[None, :]
        tl.store(place, out, mask=taken[:, None] & inside[None, :])


@triton.jit
def combine_kernel(
    rows_ptr,
    weights_ptr,
    index_ptr,
    shared_ptr,
    out_ptr,
    num_experts,
    D,
    K,
    SHARED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token, column = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < D
    total = tl.zeros((BLOCK_D,), tl.float32)
    for slot in range(K):
        if WEIGHTED:
            weight = tl.load(weights_ptr + token * K + slot).to(tl.float32)
            here = tl.load(index_ptr + token * K + slot) < num_experts  # an expert of another rank wrote no row
        else:
            weight, here = 1.0, True
        row = tl.load(rows_ptr + (token * K + slot) * D + column, mask=inside & here, other=0.0)
        total += row * weight
    if SHARED:
        total += tl.load(shared_ptr + token * D + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * D + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def expert_rows(
    x: torch.Tensor,
    index: torch.Tensor,
    gate: torch.Tensor | None,
    up: torch.Tensor,
    down: torch.Tensor,
    act: str,
    biases: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """FFN_{index_{t,k}}(x_t) in float32, [T K, D], of x [T, D] and index [T, K].

    gate (None where the network is plain) and up [E, I, D] with the same strides, down [E, D, I]; `biases` are theirs.
    Rows of an index of E or more are not written.
    """
    (tokens, top_k), (experts, size, dim) = index.shape, up.shape
    by_slot = tokens * top_k < experts
    programs = tokens * top_k if by_slot else experts
    shared = {"BY_SLOT": by_slot, "BIASED": biases is not None, "BLOCK_K": triton.next_power_of_2(top_k)}
    shared |= {"BLOCK_T": max(16, triton.next_power_of_2(tokens)), "num_warps": 4}
    gate_bias, up_bias, down_bias = biases or (None, None, None)

    hidden = torch.empty(tokens * top_k, size, dtype=x.dtype, device=x.device)
    wide = x.element_size() > 2
    block_i, block_d = (32, 64) if wide else (32, 128)
    up_kernel[(programs, triton.cdiv(size, block_i))](
        x,
        gate,
        up,
        gate_bias,
        up_bias,
        index,
        hidden,
        tokens,
        experts,
        up.stride(0),
        up.stride(1),
        0 if up_bias is None else up_bias.stride(0),
        dim,
        size,
        top_k,
        GATED=gate is not None,
        ACT=ACTIVATIONS[act],
        BLOCK_I=block_i,
        BLOCK_D=block_d,
        num_stages=3,
        **shared,
    )
    rows = torch.empty(tokens * top_k, dim, dtype=torch.float32, device=x.device)
    block_d, block_i = (32, 64) if wide else (32, 128)
    down_kernel[(programs, triton.cdiv(dim, block_d))](
        hidden,
        down,
        down_bias,
        index,
        rows,
        tokens,
        experts,
        down.stride(0),
        down.stride(1),
        dim,
        size,
        top_k,
        BLOCK_D=block_d,
        BLOCK_I=block_i,
        num_stages=4,
        **shared,
    )
    return rows


def combine(
    rows: torch.Tensor,
    weights: torch.Tensor | None,
    index: torch.Tensor | None,
    num_experts: int,
    shared: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """sum_k weight_{t,k} row_{t,k} (+ shared_t): [T, D] in `dtype`; without weights [T, K] the rows are the output."""
    dim = rows.shape[1]
    tokens, top_k = (len(rows), 1) if weights is None else weights.shape
    out = torch.empty(tokens, dim, dtype=dtype, device=rows.device)
    block = min(512, triton.next_power_of_2(dim))
    combine_kernel[(tokens, triton.cdiv(dim, block))](
        rows,
        weights,
        index,
        shared,
        out,
        num_experts,
        dim,
        top_k,
        SHARED=shared is not None,
        WEIGHTED=weights is not None,
        BLOCK_D=block,
        num_warps=4,
    )
    return out
