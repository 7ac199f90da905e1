"""Experts for few tokens: each chosen expert's weights are read once, and nothing else of them.

Shapes: T tokens, D hidden size, I expert intermediate size, E experts, K experts per token, P parts of a shared
network, each at most I wide. Up to 64 tokens fit one tile of a matrix product, so nothing is sorted: the program of an
expert reads the tokens that chose it and leaves the others' rows alone. A shared network is P more experts that every
token takes, in the same launch. Sums have a fixed order. A few tokens go another way: few_tokens.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..activations import ACTIVATIONS, activate
from ..formula import Formula
from . import few_tokens
from .overlap import OVERLAP, let_next_start, wait_for_last

MAX_TOKENS = 64  # one tile of rows; with more, sorting by expert is cheaper
MAX_PART = 1024  # of a dense network: its sum over the width is cut, so that there are programs for the whole card


class Network(NamedTuple):
    """Weights of E networks: gate (None where plain) and up [E, I, D] with the same strides, down [E, D, I]."""

    gate: torch.Tensor | None
    up: torch.Tensor
    down: torch.Tensor
    biases: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor] | None = None  # [E, I], [E, I], [E, D]


class Tile(NamedTuple):
    """How a product is cut: columns of the output a program has, depth of a step, steps in flight, warps."""

    columns: int
    depth: int
    stages: int
    warps: int


TILES = {"up": Tile(64, 128, 4, 4), "down": Tile(64, 128, 4, 4)}


def tile_arguments(name: str, x: torch.Tensor, columns: str, depth: str) -> dict[str, int]:
    """The launch's keywords; of four bytes a value half as many fit."""
    tile = TILES[name]
    sizes = {columns: tile.columns, depth: tile.depth * 2 // max(2, x.element_size())}
    return sizes | {"num_stages": tile.stages, "num_warps": tile.warps}


@triton.jit
def work_of(
    index_ptr,
    tokens,
    top_k,
    parts,
    num_experts,
    ROUTED: tl.constexpr,
    BY_SLOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """This program's shared part or expert; each token's row of the output [T, K + P]; who takes part; whether any.

    The first P programs are the parts of the shared network. Of the others, by slot: program s has the expert of slot
    s, unless an earlier slot has it already; else program e has expert e.
    """
    program, row = tl.program_id(0), tl.arange(0, BLOCK_T)
    is_shared = program < parts
    place = row * (top_k + parts) + top_k + program
    taken = (row < tokens).to(tl.int32)
    ours = is_shared
    which = program.to(tl.int64)
    if ROUTED:
        slot = tl.arange(0, BLOCK_K)
        slots = row[:, None] * top_k + slot[None, :]
        index = tl.load(index_ptr + slots, mask=(row[:, None] < tokens) & (slot[None, :] < top_k), other=-1)
        routed = tl.maximum(program - parts, 0)
        expert = tl.load(index_ptr + routed) if BY_SLOT else routed.to(tl.int64)
        hit = (index == expert) & (expert < num_experts)
        chosen = tl.max(tl.where(hit, slot[None, :], 0), axis=1)
        first = tl.min(tl.min(tl.where(hit, slots, tokens * top_k), axis=1), axis=0)
        place = tl.where(is_shared, place, row * (top_k + parts) + chosen)
        taken = tl.where(is_shared, taken, tl.max(hit.to(tl.int32), axis=1))
        ours = is_shared | ((first == routed) if BY_SLOT else (first < tokens * top_k))
        which = tl.where(is_shared, which, expert)
    return which, is_shared, place, taken > 0, ours


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
    tokens,
    num_experts,
    expert_stride,
    bias_stride,
    shared_width,
    D,
    I,  # noqa: E741
    K,
    parts,
    ROUTED: tl.constexpr,
    SHARED: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    BY_SLOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    let_next_start()
    wait_for_last()
    which, is_shared, place, taken, ours = work_of(
        index_ptr, tokens, K, parts, num_experts, ROUTED, BY_SLOT, BLOCK_T, BLOCK_K
    )
    if ours:
        row, column, depth = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_I), tl.arange(0, BLOCK_D)
        column += tl.program_id(1) * BLOCK_I
        width, base = I, tl.zeros((), tl.int64)
        if ROUTED:
            base += which * expert_stride
        gate_base, up_base = (gate_ptr if GATED else up_ptr) + base, up_ptr + base
        if SHARED:  # noqa: SIM102
            if is_shared:
                width = tl.minimum(I, shared_width - which.to(tl.int32) * I)
                up_base = shared_up_ptr + which * I * D
                gate_base = (shared_gate_ptr if GATED else shared_up_ptr) + which * I * D
        inside = column < width
        weight = column[None, :].to(tl.int64) * D + depth[:, None]
        up = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
        gate = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
        for start in range(0, D, BLOCK_D):
            here = depth + start < D
            tile = here[:, None] & inside[None, :]
            x = tl.load(
                x_ptr + row[:, None] * D + (depth + start)[None, :], mask=taken[:, None] & here[None, :], other=0.0
            )
            up = tl.dot(x, tl.load(up_base + weight + start, mask=tile, other=0.0), up, input_precision="ieee")
            if GATED:
                part = tl.load(gate_base + weight + start, mask=tile, other=0.0)
                gate = tl.dot(x, part, gate, input_precision="ieee")
        if BIASED:
            biased = column < tl.where(tl.program_id(0) >= parts, width, 0)
            up += tl.load(up_bias_ptr + which * bias_stride + column, mask=biased, other=0.0).to(tl.float32)[None, :]
            if GATED:
                bias = tl.load(gate_bias_ptr + which * bias_stride + column, mask=biased, other=0.0)
                gate += bias.to(tl.float32)[None, :]
        hidden, _, _ = activate(gate if GATED else up, up, ACTIVATION, GATED, LIMIT, SHIFT)
        target = out_ptr + place[:, None] * I + column[None, :]
        tl.store(target, hidden.to(out_ptr.dtype.element_ty), mask=taken[:, None] & inside[None, :])


@triton.jit
def down_kernel(
    hidden_ptr,
    down_ptr,
    bias_ptr,
    shared_down_ptr,
    index_ptr,
    out_ptr,
    tokens,
    num_experts,
    expert_stride,
    shared_width,
    D,
    I,  # noqa: E741
    K,
    parts,
    ROUTED: tl.constexpr,
    SHARED: tl.constexpr,
    BIASED: tl.constexpr,
    ALIGNED: tl.constexpr,
    BY_SLOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    let_next_start()
    wait_for_last()
    which, is_shared, place, taken, ours = work_of(
        index_ptr, tokens, K, parts, num_experts, ROUTED, BY_SLOT, BLOCK_T, BLOCK_K
    )
    if ours:
        column, depth = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_I)
        inside = column < D
        width, row_stride, base = I, I, down_ptr
        if ROUTED:
            base = down_ptr + which * expert_stride
        if SHARED:  # noqa: SIM102
            if is_shared:
                width, row_stride = tl.minimum(I, shared_width - which.to(tl.int32) * I), shared_width
                base = shared_down_ptr + which * I
        if ALIGNED:
            row_stride = tl.multiple_of(row_stride, 16)
        weight = column[None, :].to(tl.int64) * row_stride + depth[:, None]
        out = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for start in range(0, width, BLOCK_I):
            here = depth + start < width
            hidden = tl.load(
                hidden_ptr + place[:, None] * I + (depth + start)[None, :],
                mask=taken[:, None] & here[None, :],
                other=0.0,
            )
            tile = tl.load(base + weight + start, mask=here[:, None] & inside[None, :], other=0.0)
            out = tl.dot(hidden, tile, out, input_precision="ieee")
        if BIASED:
            biased = column < tl.where(tl.program_id(0) >= parts, D, 0)
            out += tl.load(bias_ptr + which * D + column, mask=biased, other=0.0).to(tl.float32)[None, :]
        target = out_ptr + place[:, None] * D + column[None, :]
        tl.store(target, out, mask=taken[:, None] & inside[None, :])


@triton.jit
def combine_kernel(
    rows_ptr,
    weights_ptr,
    index_ptr,
    out_ptr,
    num_experts,
    D,
    K,
    parts,
    residual_ptr,
    ROUTED: tl.constexpr,
    ADDS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    let_next_start()
    wait_for_last()
    token, column = tl.program_id(0), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < D
    total = tl.zeros((BLOCK_D,), tl.float32)
    rows_ptr += token * (K + parts) * D + column
    if ROUTED:
        for slot in range(K):
            weight = tl.load(weights_ptr + token * K + slot).to(tl.float32)
            # An expert of another rank wrote no row.
            width = tl.where(tl.load(index_ptr + token * K + slot) < num_experts, D, 0)
            total += weight * tl.load(rows_ptr + slot * D, mask=column < width, other=0.0)
    for slot in range(K, K + parts):
        total += tl.load(rows_ptr + slot * D, mask=inside, other=0.0)
    total = total.to(out_ptr.dtype.element_ty)
    if ADDS:
        residual = tl.load(residual_ptr + token * D + column, mask=inside, other=0.0).to(tl.float32)
        total = (total.to(tl.float32) + residual).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * D + column, total, mask=inside)


def mixture(
    x: torch.Tensor,
    weights: torch.Tensor | None,
    index: torch.Tensor | None,
    routed: Network | None,
    shared: Network | None,
    formula: Formula,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """sum_k weight_{t,k} FFN_{index_{t,k}}(x_t) + FFN_shared(x_t): [T, D] of x [T, D], weights and index [T, K].

    Either network may be missing; the shared one has E = 1. `formula` is that of both. An index of E or more
    adds nothing. `residual` [T, D] is added to the sum, once that has x's dtype.
    """
    (tokens, dim), experts, top_k, parts, width = x.shape, 0, 0, 0, 0
    size = min(MAX_PART, shared.up.shape[1]) if routed is None else routed.up.shape[1]
    if routed is not None:
        experts, top_k = len(routed.up), index.shape[1]
    if shared is not None:
        width = shared.up.shape[1]
        parts = triton.cdiv(width, size)
    residual = None if residual is None else residual.contiguous()
    few = few_tokens.MAX_TOKENS if routed is not None else 1  # of several, a dense network's weights serve all
    if tokens <= few and top_k + parts <= few_tokens.MAX_SLOTS:
        return few_tokens.mixture(x, weights, index, routed, shared, formula, residual, size, parts)
    by_slot = tokens * top_k < experts
    programs = parts + (tokens * top_k if by_slot else experts)
    one = routed or shared
    gate_bias, up_bias, down_bias = one.biases or (None, None, None)
    other = shared or one
    settings = {"ROUTED": routed is not None, "SHARED": shared is not None, "BIASED": one.biases is not None}
    settings |= {"BY_SLOT": by_slot, "BLOCK_K": triton.next_power_of_2(max(1, top_k))}
    settings |= {"BLOCK_T": max(16, triton.next_power_of_2(tokens))}
    hidden = torch.empty(tokens * (top_k + parts), size, dtype=x.dtype, device=x.device)
    up_kernel[(programs, triton.cdiv(size, TILES["up"].columns))](
        x,
        one.gate,
        one.up,
        gate_bias,
        up_bias,
        other.gate,
        other.up,
        index,
        hidden,
        tokens,
        experts,
        one.up.stride(0),
        0 if up_bias is None else up_bias.stride(0),
        width,
        dim,
        size,
        top_k,
        parts,
        GATED=one.gate is not None,
        ACTIVATION=ACTIVATIONS[formula.activation],
        LIMIT=formula.limit,
        SHIFT=formula.shift,
        **settings,
        **tile_arguments("up", x, "BLOCK_I", "BLOCK_D"),
        **OVERLAP,
    )
    out = torch.empty(tokens, dim, dtype=x.dtype, device=x.device)
    aligned = size % 16 == 0 and width % 16 == 0
    rows = torch.empty(tokens * (top_k + parts), dim, dtype=torch.float32, device=x.device)
    down_kernel[(programs, triton.cdiv(dim, TILES["down"].columns))](
        hidden,
        one.down,
        down_bias,
        other.down,
        index,
        rows,
        tokens,
        experts,
        one.down.stride(0),
        width,
        dim,
        size,
        top_k,
        parts,
        ALIGNED=aligned,
        **settings,
        **tile_arguments("down", x, "BLOCK_D", "BLOCK_I"),
        **OVERLAP,
    )
    block = min(512, triton.next_power_of_2(dim))
    combine_kernel[(tokens, triton.cdiv(dim, block))](
        rows,
        weights,
        index,
        out,
        experts,
        dim,
        top_k,
        parts,
        residual,
        ROUTED=routed is not None,
        ADDS=residual is not None,
        BLOCK_D=block,
        num_warps=4,
        **OVERLAP,
    )
    return out
