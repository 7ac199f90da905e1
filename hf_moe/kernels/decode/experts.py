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
from .adapters import Adapter
from .few_tokens import Network
from .overlap import OVERLAP, let_next_start, wait_for_last
from .stored import STEP, Weight, alike, of_matrix, plus_product, rows_of_x, settings, step_within

MAX_TOKENS = 64  # one tile of rows; with more, sorting by expert is cheaper
MAX_PART = 1024  # of a dense network: its sum over the width is cut, so that there are programs for the whole card


def part_of(down: Weight) -> int:
    """How wide a part of a dense network is, of its down [D, I]."""
    return min(MAX_PART, down.shape[-1])


def cuts(down: Weight, part: int) -> bool:
    """Whether a network may be cut into parts of that width: each begins with a byte, and a step within a block."""
    whole = down.shape[-1] <= part
    return whole or down.form == 0 or part % step_within(down, max(STEP[down.form], TILES["down"].depth)) == 0


def joined(routed: Network, shared: Network) -> bool:
    """Whether the shared network's parts may be experts more."""
    alike_stored = routed.layout == shared.layout and alike(routed.down, shared.down)
    return alike_stored and cuts(shared.down, routed.down.shape[-1])


class Tile(NamedTuple):
    """How a product is cut: columns of the output a program has, depth of a step, steps in flight, warps."""

    columns: int
    depth: int
    stages: int
    warps: int


TILES = {"up": Tile(64, 128, 4, 4), "down": Tile(64, 128, 4, 4)}


def tile_arguments(name: str, x: torch.Tensor, weight: Weight, columns: str, depth: str) -> dict[str, int]:
    """The launch's keywords; of four bytes a value half as many fit."""
    tile = TILES[name]
    sizes = {columns: tile.columns, depth: step_within(weight, tile.depth * 2 // max(2, x.element_size()))}
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
def plus_turned(total, x, weight, column, inside, start, end, size, BLOCK_A: tl.constexpr):
    """As `plus_product`, of a matrix [in, out] whose rows are `size` long."""
    step = start + tl.arange(0, BLOCK_A)
    place = weight[0] + step.to(tl.int64)[:, None] * size + column[None, :]
    values = tl.load(place, mask=(step < end)[:, None] & inside[None, :], other=0.0)
    return tl.dot(x[0], values, total, input_precision="ieee")


@triton.jit
def turned_up(
    x_rows,
    taken,
    up,
    D,
    I,  # noqa: E741
    GATED: tl.constexpr,
    STORED: tl.constexpr,
    LAYOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gate and up [T, I] of rows of x by a matrix [in, out]; without a gate both are up."""
    WIDTH: tl.constexpr = 2 * BLOCK_I if LAYOUT == 2 else BLOCK_I
    size = 2 * I if GATED else I
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = column < (size if LAYOUT == 2 else I)
    one, other = tl.zeros((BLOCK_T, WIDTH), tl.float32), tl.zeros((BLOCK_T, WIDTH), tl.float32)
    for start in range(0, D, BLOCK_D):
        x = rows_of_x(x_rows, taken[:, None], start, D, STORED, BLOCK_D)
        one = plus_turned(one, x, up, column, inside, start, D, size, BLOCK_D)
        if GATED and LAYOUT == 1:
            other = plus_turned(other, x, up, I + column, inside, start, D, size, BLOCK_D)
    if LAYOUT == 2:
        one, other = tl.split(tl.reshape(one, (BLOCK_T, BLOCK_I, 2)))
    elif not GATED:
        other = one
    return one, other


@triton.jit
def up_kernel(
    x_ptr,
    gate,
    up,
    gate_bias_ptr,
    up_bias_ptr,
    shared_gate,
    shared_up,
    index_ptr,
    out_ptr,
    tokens,
    num_experts,
    expert_stride,
    scale_stride,
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
    STORED: tl.constexpr,  # `stored.settings`
    LAYOUT: tl.constexpr,  # `Network.layout`
    BIAS_STEP: tl.constexpr,
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
        row, column = tl.arange(0, BLOCK_T), tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
        width, of_part = I, column
        if ROUTED:
            up = of_matrix(up, which * expert_stride, which * scale_stride)
            if GATED:
                gate = of_matrix(gate, which * expert_stride, which * scale_stride)
        if SHARED:  # noqa: SIM102
            if is_shared:
                width = tl.minimum(I, shared_width - which.to(tl.int32) * I)
                of_part = column + which.to(tl.int32) * I
                up = shared_up
                if GATED:
                    gate = shared_gate
        inside = column < width
        of_up = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
        of_gate = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
        if LAYOUT > 0:
            x_rows = x_ptr + row[:, None] * D
            of_gate, of_up = turned_up(x_rows, taken, up, D, I, GATED, STORED, LAYOUT, BLOCK_T, BLOCK_I, BLOCK_D)
        else:
            for start in range(0, D, BLOCK_D):
                x = rows_of_x(x_ptr + row[:, None] * D, taken[:, None], start, D, STORED, BLOCK_D)
                of_up = plus_product(of_up, x, up, of_part, inside, start, D, D, STORED, BLOCK_D)
                if GATED:
                    of_gate = plus_product(of_gate, x, gate, of_part, inside, start, D, D, STORED, BLOCK_D)
        if BIASED:
            biased = column < tl.where(tl.program_id(0) >= parts, width, 0)
            of_column = which * bias_stride + column * BIAS_STEP
            bias = tl.load(up_bias_ptr + of_column, mask=biased, other=0.0)
            of_up += bias.to(tl.float32)[None, :]
            if GATED:
                bias = tl.load(gate_bias_ptr + of_column, mask=biased, other=0.0)
                of_gate += bias.to(tl.float32)[None, :]
        hidden, _, _ = activate(of_gate if GATED else of_up, of_up, ACTIVATION, GATED, LIMIT, SHIFT)
        target = out_ptr + place[:, None] * I + column[None, :]
        tl.store(target, hidden.to(out_ptr.dtype.element_ty), mask=taken[:, None] & inside[None, :])


@triton.jit
def down_kernel(
    hidden_ptr,
    down,
    bias_ptr,
    shared_down,
    index_ptr,
    out_ptr,
    tokens,
    num_experts,
    expert_stride,
    scale_stride,
    shared_width,
    D,
    I,  # noqa: E741
    K,
    parts,
    ROUTED: tl.constexpr,
    SHARED: tl.constexpr,
    BIASED: tl.constexpr,
    ALIGNED: tl.constexpr,
    STORED: tl.constexpr,  # `stored.settings`
    LAYOUT: tl.constexpr,  # `Network.layout`
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
        column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = column < D
        width, stride, first = I, I, 0
        if ROUTED:
            down = of_matrix(down, which * expert_stride, which * scale_stride)
        if SHARED:  # noqa: SIM102
            if is_shared:
                first, stride = which.to(tl.int32) * I, shared_width
                width = tl.minimum(I, shared_width - first)
                down = shared_down
        if ALIGNED:
            first, stride = tl.multiple_of(first, 16), tl.multiple_of(stride, 16)
        out = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        for start in range(0, width, BLOCK_I):
            hidden = rows_of_x(hidden_ptr + place[:, None] * I, taken[:, None], start, width, STORED, BLOCK_I)
            begin, end = first + start, first + width
            if LAYOUT > 0:
                out = plus_turned(out, hidden, down, column, inside, begin, end, D, BLOCK_I)
            else:
                out = plus_product(out, hidden, down, column, inside, begin, end, stride, STORED, BLOCK_I)
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
    adapters: tuple[Adapter | None, Adapter | None] = (None, None),
) -> torch.Tensor:
    """sum_k weight_{t,k} FFN_{index_{t,k}}(x_t) + FFN_shared(x_t): [T, D] of x [T, D], weights and index [T, K].

    Either network may be missing; the shared one has E = 1. `formula` is that of both. An index of E or more
    adds nothing. `residual` [T, D] is added to the sum, once that has x's dtype. `adapters` are those on the routed up
    and down, of few tokens alone.
    """
    (tokens, dim), experts, top_k, parts, width = x.shape, 0, 0, 0, 0
    size = part_of(shared.down) if routed is None else routed.up.shape[1]
    if routed is not None:
        experts, top_k = routed.up.shape[0], index.shape[1]
    if shared is not None:
        width = shared.up.shape[1]
        parts = triton.cdiv(width, size)
    residual = None if residual is None else residual.contiguous()
    few = few_tokens.MAX_TOKENS if routed is not None else 1  # of several, a dense network's weights serve all
    one = routed or shared
    if tokens <= few and top_k + parts <= few_tokens.MAX_SLOTS and one.layout == 0:
        return few_tokens.mixture(x, weights, index, routed, shared, formula, residual, size, parts, adapters)
    assert adapters == (None, None), adapters
    by_slot = tokens * top_k < experts
    programs = parts + (tokens * top_k if by_slot else experts)
    gate_bias, up_bias, down_bias = one.biases or (None, None, None)
    other = shared or one
    given = {"ROUTED": routed is not None, "SHARED": shared is not None, "BIASED": one.biases is not None}
    given |= {"BY_SLOT": by_slot, "BLOCK_K": triton.next_power_of_2(max(1, top_k))}
    given |= {"BLOCK_T": max(16, triton.next_power_of_2(tokens)), "LAYOUT": one.layout}
    hidden = torch.empty(tokens * (top_k + parts), size, dtype=x.dtype, device=x.device)
    up_kernel[(programs, triton.cdiv(size, TILES["up"].columns))](
        x,
        one.gate and one.gate.pointers,
        one.up.pointers,
        gate_bias,
        up_bias,
        other.gate and other.gate.pointers,
        other.up.pointers,
        index,
        hidden,
        tokens,
        experts,
        *one.up.strides,
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
        BIAS_STEP=1 if up_bias is None else up_bias.stride(1),
        **given,
        **settings(one.up, other.up),
        **tile_arguments("up", x, one.up, "BLOCK_I", "BLOCK_D"),
        **OVERLAP,
    )
    out = torch.empty(tokens, dim, dtype=x.dtype, device=x.device)
    aligned = size % 16 == 0 and width % 16 == 0
    rows = torch.empty(tokens * (top_k + parts), dim, dtype=torch.float32, device=x.device)
    down_kernel[(programs, triton.cdiv(dim, TILES["down"].columns))](
        hidden,
        one.down.pointers,
        down_bias,
        other.down.pointers,
        index,
        rows,
        tokens,
        experts,
        *one.down.strides,
        width,
        dim,
        size,
        top_k,
        parts,
        ALIGNED=aligned,
        **given,
        **settings(one.down, other.down, part=size),
        **tile_arguments("down", x, one.down, "BLOCK_D", "BLOCK_I"),
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
