"""The products of a few tokens: as fast as weights are read, by programs so small that many wait side by side.

A program holds its few rows of weights in registers and has asked for them before it waits for the launch before it:
while that ends, the next one's weights are under way. Of experts, the second product can do so, since it knows the
choice by then. Tensor cores would take 16 tokens, and shared memory that keeps the next launch's programs out.
Programs that read the same weights for different tokens are neighbours, so that the card's cache has them.

A thread's loads stand before the first use of any: it waits where a value is used, not where it is asked for.

Shapes: T tokens, A depth, C columns, D hidden size, I expert intermediate size, E experts, K experts per token, P
parts of a shared network.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..activations import ACTIVATIONS, activate
from ..formula import Formula
from .adapters import SITES, Adapter, OnExperts, Turn
from .norms import normalized
from .overlap import OVERLAP, arrive, let_next_start, wait_for, wait_for_last
from .stored import BYTES, STEP, Weight, asked, columns_of, of_matrix, settings, times

TILES, WARPS = (4096, 8192, 8192), 2  # weights of each form that a program holds, and its warps
SUM_COLUMNS, SUM_WARPS = (1, 2, 1), 4  # of the sum of experts
# Numbers of a row that a warp of it reads: of 4 bits a run a thread, which x reaches without shared memory, as long as
# its registers hold those of all slots.
SUM_LEAST, SUM_SLOTS = (1, 1, 1024), 8
MAX_SLOTS = 16  # whose weights it can hold
MAX_TOKENS = 4


class Network(NamedTuple):
    """Weights of E networks: gate (None where plain) and up [E, I, D] with the same strides, down [E, D, I].

    With a `layout` they are stored as [E, in, out], gate and up as one matrix [E, D, 2 I]: 1, all of gate first; 2, in
    turns. Shapes are those without.
    """

    gate: Weight | None
    up: Weight
    down: Weight
    biases: tuple[torch.Tensor | None, torch.Tensor, torch.Tensor] | None = None  # [E, I], [E, I], [E, D]
    layout: int = 0


@triton.jit
def begin(count_ptr, counted, cleared_ptr, COUNTS: tl.constexpr, CLEARS: tl.constexpr):
    """What the first program does once the launches before have ended: count, and set their counters back to 0."""
    if COUNTS:  # noqa: SIM102
        if tl.program_id(0) == 0:
            tl.store(count_ptr, tl.load(count_ptr) + counted)
    if CLEARS > 0:  # noqa: SIM102
        if tl.program_id(0) + tl.program_id(1) == 0:
            tl.store(cleared_ptr + tl.arange(0, CLEARS), tl.zeros((CLEARS,), tl.int32))


@triton.jit
def lower(
    x_ptr,
    x_row,
    norm_ptr,
    eps,
    a_ptr,  # [rank, depth]
    low_ptr,
    place,  # of the rows of A that this program has
    rank,
    depth,
    TOKENS: tl.constexpr,
    NORMED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some columns of A x [T, rank], of x [T, depth] or its RMSNorm."""
    step, real = tl.arange(0, BLOCK), place < rank
    a_ptr += place[:, None] * depth
    first = tl.load(a_ptr + step[None, :], mask=real[:, None] & (step < depth)[None, :], other=0.0)
    if NORMED:
        norm = tl.load(norm_ptr + step, mask=step < depth, other=0.0).to(tl.float32)
    wait_for_last()
    for row in tl.static_range(TOKENS):
        x = tl.load(x_ptr + row * x_row + step, mask=step < depth, other=0.0)
        if NORMED:  # of one tile
            x = normalized(x, norm, depth, eps, x.dtype)
        total = tl.sum(x.to(tl.float32)[None, :] * first.to(tl.float32), axis=1)
        for start in range(BLOCK, depth, BLOCK):
            here = start + step < depth
            x = tl.load(x_ptr + row * x_row + start + step, mask=here, other=0.0)
            a = tl.load(a_ptr + (start + step)[None, :], mask=real[:, None] & here[None, :], other=0.0)
            total += tl.sum(x.to(tl.float32)[None, :] * a.to(tl.float32), axis=1)
        tl.store(low_ptr + row * rank + place, total.to(low_ptr.dtype.element_ty), mask=real)


@triton.jit
def product_kernel(  # noqa: C901
    x_ptr,
    weight,
    out_ptr,
    weight2,
    out2_ptr,
    weight3,
    out3_ptr,
    norm_ptr,
    eps,
    depth,
    columns,
    columns2,
    columns3,
    count_ptr,
    counted,
    x_row,
    adapter,  # A, A x [T, rank] and B [C, rank] of each weight, and the scaling, 0 without one
    adapter2,
    adapter3,
    rank,
    lows,  # programs for each adapter's A x
    arrived_ptr,
    cleared_ptr,
    TOKENS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    NORMED: tl.constexpr,
    COUNTS: tl.constexpr,
    CLEARS: tl.constexpr,  # how many counters; 0 without adapters in this launch and those it takes turns with
    RANK: tl.constexpr,  # as a power of two; 0 without adapters
    STORED: tl.constexpr,  # `stored.settings`
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of A, and columns of a step
    BLOCK_L: tl.constexpr,
):
    """Some columns of A x of an adapter, or of one of up to three products of x [T, A], or of its RMSNorm."""
    let_next_start()
    block, step = tl.program_id(0), columns_of(STORED, BLOCK_A)
    if RANK > 0:
        if block < WEIGHTS * lows:
            if WEIGHTS > 1:  # noqa: SIM102
                if block >= lows:
                    block -= lows
                    adapter = adapter2
                    if WEIGHTS > 2:  # noqa: SIM102
                        if block >= lows:
                            block -= lows
                            adapter = adapter3
            place = block * BLOCK_R + tl.arange(0, BLOCK_R)
            lower(x_ptr, x_row, norm_ptr, eps, adapter[0], adapter[1], place, rank, depth, TOKENS, NORMED, BLOCK_L)
            arrive(arrived_ptr)
            begin(count_ptr, counted, cleared_ptr, COUNTS, CLEARS)
            return
        block -= WEIGHTS * lows
    out, width = out_ptr, columns
    if WEIGHTS > 1:  # noqa: SIM102
        if block >= tl.cdiv(columns, BLOCK_C):
            block -= tl.cdiv(columns, BLOCK_C)
            weight, out, width, adapter = weight2, out2_ptr, columns2, adapter2
            if WEIGHTS > 2:  # noqa: SIM102
                if block >= tl.cdiv(columns2, BLOCK_C):
                    block -= tl.cdiv(columns2, BLOCK_C)
                    weight, out, width, adapter = weight3, out3_ptr, columns3, adapter3
    column = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < width
    first = asked(weight, column, inside, 0, depth, depth, STORED, BLOCK_A, False)
    if NORMED:
        norm = tl.load(norm_ptr + step, mask=step < depth, other=0.0).to(tl.float32)
    if RANK > 0:
        place = tl.arange(0, RANK)
        real = (place < rank) & (adapter[3] != 0.0)
        widen = adapter[2] + column[:, None] * rank + place[None, :]
        widen = tl.load(widen, mask=inside[:, None] & real[None, :], other=0.0).to(tl.float32)
    wait_for_last()
    begin(count_ptr, counted, cleared_ptr, COUNTS, CLEARS)
    for row in tl.static_range(TOKENS):
        x = tl.load(x_ptr + row * x_row + step, mask=step < depth, other=0.0)
        if RANK > 0:
            if row == 0:
                wait_for(arrived_ptr, WEIGHTS * lows)
            low = tl.load(adapter[1] + row * rank + place, mask=real, other=0.0, cache_modifier=".cg")
        if NORMED:  # of one tile
            x = normalized(x, norm, depth, eps, x.dtype)
        total = tl.sum(times(x.to(tl.float32), first, STORED, BLOCK_A), axis=1)
        for start in range(BLOCK_A, depth, BLOCK_A):
            x = tl.load(x_ptr + row * x_row + start + step, mask=step + start < depth, other=0.0)
            further = asked(weight, column, inside, start, depth, depth, STORED, BLOCK_A, False)
            total += tl.sum(times(x.to(tl.float32), further, STORED, BLOCK_A), axis=1)
        if RANK > 0:
            total += adapter[3] * tl.sum(low.to(tl.float32)[None, :] * widen, axis=1)
        tl.store(out + row * width + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def sizes(depth: int, rows: int = 1, form: int = 0) -> dict[str, int]:
    """How a program's tile is cut, of as many registers for each column as `rows` of it take."""
    tile = TILES[form]
    block = max(STEP[form], min(tile, triton.next_power_of_2(depth)))
    return {"BLOCK_C": max(1, tile // block // triton.next_power_of_2(rows)), "BLOCK_A": block, "num_warps": WARPS}


def of_low(depth: int) -> dict[str, int]:
    """How the programs that compute A x are cut."""
    block = min(TILES[0], triton.next_power_of_2(depth))
    return {"BLOCK_R": TILES[0] // block, "BLOCK_L": block}


def linear(
    x: torch.Tensor,
    weights: tuple[Weight, ...],
    norm: tuple[torch.Tensor, float] | None,
    counted: tuple[torch.Tensor, int] | None,
    adapters: Sequence[Adapter | None] = (),
    turn: Turn | None = None,
) -> list[torch.Tensor]:
    """x W^T [T, C] for each of one to three weights [C, A], of x [T, A] or its norm, whose depth a tile must hold.

    The first that is `counted` grows by the second. `adapters`, if there are any, are those of each weight, of one
    rank; then, and where another launch of the same turns has some, it is this launch's `turn`.
    """
    depth, columns, first = x.shape[1], [weight.shape[0] for weight in weights], weights[0]
    cut, low, count = sizes(depth, len(x), first.form), of_low(depth), len(weights)
    outs = [torch.empty(len(x), size, dtype=x.dtype, device=x.device) for size in columns]
    missing = [None] * (3 - count)
    pointers = [weight.pointers for weight in weights]
    pairs = [y for pair in zip([*pointers, *missing], outs + missing, strict=True) for y in pair]
    norm_weight, eps = norm or (None, 0.0)
    added, rank = factors(x, adapters)
    lows = triton.cdiv(rank, low["BLOCK_R"])
    product_kernel[(count * lows + sum(triton.cdiv(size, cut["BLOCK_C"]) for size in columns),)](
        x,
        *pairs,
        norm_weight,
        eps,
        depth,
        *(columns + [0] * len(missing)),
        *(counted or (None, 0)),
        x.stride(0),
        *added,
        rank,
        lows,
        *(turn or (None, None)),
        TOKENS=len(x),
        WEIGHTS=count,
        NORMED=norm is not None,
        COUNTS=counted is not None,
        CLEARS=0 if turn is None else SITES,
        RANK=padded(rank),
        **settings(*weights),
        **cut,
        **low,
        **OVERLAP,
    )
    return outs


def factors(x: torch.Tensor, adapters: Sequence[Adapter | None]) -> tuple[tuple[tuple, ...], int]:
    """What the kernel is told of each weight's adapter: A, room for A x, B and the scaling; and the rank of all."""
    real = [adapter for adapter in adapters if adapter is not None]
    if not real:
        return ((x, x, x, 0.0),) * 3, 0
    rank, nothing = len(real[0].a), real[0]._replace(scaling=0.0)
    low = torch.empty(3, len(x), rank, dtype=real[0].a.dtype, device=x.device)
    each = [adapter or nothing for adapter in adapters] + [nothing] * (3 - len(adapters))
    return tuple((a, room, b, float(scaling)) for (a, b, scaling), room in zip(each, low, strict=True)), rank


def padded(rank: int) -> int:
    """As a power of two."""
    return max(16, triton.next_power_of_2(rank)) if rank else 0


@triton.jit
def rows_of_b(widen, column, inside, rank, widen_row, widen_rank, RANK: tl.constexpr):
    """[C, RANK] of B [., rank] of any strides."""
    step = tl.arange(0, RANK)
    place = widen + column[:, None].to(tl.int64) * widen_row + step[None, :] * widen_rank
    return tl.load(place, mask=inside[:, None] & (step < rank)[None, :], other=0.0)


@triton.jit
def up_kernel(  # noqa: C901, PLR0915
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
    a_ptr,  # A [E, rank, D]
    low_ptr,  # A x [T, K, rank] of the chosen experts
    widen_ptr,  # B [E, U, rank], U as of up: gate's rows come first
    rank,
    lows,  # programs for A x of a slot
    widen_expert,
    widen_row,
    widen_rank,
    scaling,
    arrived_ptr,  # one counter a slot
    cleared_ptr,
    CLEARS: tl.constexpr,
    RANK: tl.constexpr,
    ROUTED: tl.constexpr,
    SHARED: tl.constexpr,
    GATED: tl.constexpr,
    BIASED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    SHIFT: tl.constexpr,
    STORED: tl.constexpr,  # `stored.settings`
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Some columns of one of a token's P parts of the shared network, which come first, or of a slot's expert; before
    them, of the expert's A x."""
    token, program, step = tl.program_id(0) % tokens, tl.program_id(0) // tokens, columns_of(STORED, BLOCK_A)
    place, block = token * (parts + K) + program, tl.program_id(1)
    wait_for_last()
    let_next_start()  # only now: the next one needs `index` before it waits
    begin(None, 0, cleared_ptr, False, CLEARS)
    if RANK > 0:
        of_slot = token * K + program - parts
        if block < lows:
            if program >= parts:
                expert = tl.load(index_ptr + of_slot)
                low_row = block * BLOCK_R + tl.arange(0, BLOCK_R)
                a_ptr += tl.where(expert < num_experts, expert, 0) * rank * D
                x_ptr += token * D
                low_ptr += of_slot * rank
                lower(x_ptr, 0, None, 0.0, a_ptr, low_ptr, low_row, rank, D, 1, False, BLOCK_L)
                arrive(arrived_ptr + of_slot)
            return
        block -= lows
    column = block * BLOCK_C + tl.arange(0, BLOCK_C)
    width, row = I, column
    expert = tl.zeros((), tl.int64)
    if ROUTED:
        expert += tl.load(index_ptr + token * K + tl.maximum(program - parts, 0))
        width = tl.where(expert < num_experts, I, 0)  # that of another rank
        up = of_matrix(up, expert * expert_stride, expert * scale_stride)
        if GATED:
            gate = of_matrix(gate, expert * expert_stride, expert * scale_stride)
    if SHARED:  # noqa: SIM102
        if program < parts:
            width = tl.minimum(I, shared_width - program * I)
            row = column + program * I
            up = shared_up
            if GATED:
                gate = shared_gate
    inside = column < width
    x_ptr += token * D
    tile = asked(up, row, inside, 0, D, D, STORED, BLOCK_A, True)
    if GATED:
        gate_tile = asked(gate, row, inside, 0, D, D, STORED, BLOCK_A, True)
    x = tl.load(x_ptr + step, mask=step < D, other=0.0).to(tl.float32)
    of_up, of_gate = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    if RANK > 0:
        adapted, widen = column < tl.where(program >= parts, width, 0), widen_ptr + expert * widen_expert
        if GATED:
            gate_b = rows_of_b(widen, column, adapted, rank, widen_row, widen_rank, RANK)
            widen += I * widen_row
        up_b = rows_of_b(widen, column, adapted, rank, widen_row, widen_rank, RANK)
        ranks, real = tl.arange(0, RANK), tl.where(program >= parts, rank, 0)
        wait_for(arrived_ptr + tl.maximum(of_slot, 0), tl.where(program >= parts, lows, 0))
        low = tl.load(low_ptr + of_slot * rank + ranks, mask=ranks < real, other=0.0, cache_modifier=".cg")
        low = scaling * low.to(tl.float32)[None, :]
        of_up += tl.sum(low * up_b, axis=1)
        if GATED:
            of_gate += tl.sum(low * gate_b, axis=1)
    of_up += tl.sum(times(x, tile, STORED, BLOCK_A), axis=1)
    if GATED:
        of_gate += tl.sum(times(x, gate_tile, STORED, BLOCK_A), axis=1)
    for start in range(BLOCK_A, D, BLOCK_A):
        tile = asked(up, row, inside, start, D, D, STORED, BLOCK_A, True)
        if GATED:
            gate_tile = asked(gate, row, inside, start, D, D, STORED, BLOCK_A, True)
        x = tl.load(x_ptr + start + step, mask=step + start < D, other=0.0).to(tl.float32)
        of_up += tl.sum(times(x, tile, STORED, BLOCK_A), axis=1)
        if GATED:
            of_gate += tl.sum(times(x, gate_tile, STORED, BLOCK_A), axis=1)
    if BIASED:
        biased = column < tl.where(program >= parts, width, 0)
        of_up += tl.load(up_bias_ptr + expert * bias_stride + column, mask=biased, other=0.0).to(tl.float32)
        if GATED:
            of_gate += tl.load(gate_bias_ptr + expert * bias_stride + column, mask=biased, other=0.0).to(tl.float32)
    hidden, _, _ = activate(of_gate if GATED else of_up, of_up, ACTIVATION, GATED, LIMIT, SHIFT)
    # Zero where there is nothing, so that the next launch need not know where that is.
    tl.store(out_ptr + place * I + column, tl.where(inside, hidden, 0.0).to(out_ptr.dtype.element_ty), mask=column < I)


@triton.jit
def b_of_slots(
    widen_ptr,
    index_ptr,
    column,
    num_experts,
    D,
    rank,
    widen_expert,
    widen_row,
    widen_rank,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
):
    """[C, SLOTS, RANK] of B of each of a token's experts; 0 for those of another rank."""
    slot, step = tl.arange(0, SLOTS), tl.arange(0, RANK)
    expert = tl.load(index_ptr + slot, mask=slot < K, other=num_experts)
    place = (expert * widen_expert)[:, None] + (step * widen_rank)[None, :]
    place = column.to(tl.int64)[:, None, None] * widen_row + place[None, :, :]
    mask = (column < D)[:, None, None] & ((expert < num_experts)[:, None] & (step < rank)[None, :])[None, :, :]
    return tl.load(widen_ptr + place, mask=mask, other=0.0)


@triton.jit
def weighted_low(low_ptr, weights_ptr, rank, K: tl.constexpr, SLOTS: tl.constexpr, RANK: tl.constexpr):
    """[SLOTS, RANK] of A h of a token's slots times their weights."""
    slot, step = tl.arange(0, SLOTS), tl.arange(0, RANK)
    weight = tl.load(weights_ptr + slot, mask=slot < K, other=0.0).to(tl.float32)
    mask = (slot < K)[:, None] & (step < rank)[None, :]
    low = tl.load(low_ptr + slot[:, None] * rank + step[None, :], mask=mask, other=0.0, cache_modifier=".cg")
    return weight[:, None] * low.to(tl.float32)


@triton.jit
def sum_kernel(
    hidden_ptr,
    down,
    bias_ptr,
    shared_down,
    index_ptr,
    weights_ptr,
    residual_ptr,
    out_ptr,
    num_experts,
    expert_stride,
    scale_stride,
    shared_width,
    D,
    I,  # noqa: E741
    a_ptr,  # A [E, rank, I]
    low_ptr,  # A h [T, K, rank] of the chosen experts
    widen_ptr,  # B [E, D, rank]
    rank,
    lows,  # programs for A h of a slot
    widen_expert,
    widen_row,
    widen_rank,
    scaling,
    arrived_ptr,  # one counter a token
    cleared_ptr,
    CLEARS: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,  # K as a power of two
    PARTS: tl.constexpr,
    RANK: tl.constexpr,
    BIASED: tl.constexpr,
    ALIGNED: tl.constexpr,
    ADDS: tl.constexpr,
    STORED: tl.constexpr,  # `stored.settings`
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """Some columns of the down-projections of all of a token's parts and slots, weighted, and their sum; before them,
    of one slot's A h."""
    let_next_start()
    token, block, step = tl.program_id(0), tl.program_id(1), columns_of(STORED, BLOCK_A)
    slots = token * K
    if RANK > 0:
        if block < K * lows:
            which = block // lows
            expert = tl.load(index_ptr + slots + which)
            low_row = block % lows * BLOCK_R + tl.arange(0, BLOCK_R)
            a_ptr += tl.where(expert < num_experts, expert, 0) * rank * I
            hidden_ptr += (token * (PARTS + K) + PARTS + which) * I
            low_ptr += (slots + which) * rank
            lower(hidden_ptr, 0, None, 0.0, a_ptr, low_ptr, low_row, rank, I, 1, False, BLOCK_L)
            arrive(arrived_ptr + token)
            begin(None, 0, cleared_ptr, False, CLEARS)
            return
        block -= K * lows
    column = block * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = column < D
    stride = tl.multiple_of(shared_width, 16) if ALIGNED else shared_width
    chosen, tiles, rows, weights = (), (), (), ()
    for slot in tl.static_range(K):
        chosen = chosen + (tl.load(index_ptr + slots + slot),)  # noqa: RUF005
    for part in tl.static_range(PARTS):
        end = tl.minimum((part + 1) * I, shared_width)
        tile = asked(shared_down, column, inside, part * I, end, stride, STORED, BLOCK_A, False)
        tiles = tiles + (tile,)  # noqa: RUF005
    for slot in tl.static_range(K):
        width, expert = tl.where(chosen[slot] < num_experts, I, 0), chosen[slot]
        of_expert = of_matrix(down, expert * expert_stride, expert * scale_stride)
        tile = asked(of_expert, column, inside, 0, width, I, STORED, BLOCK_A, True)
        tiles = tiles + (tile,)  # noqa: RUF005
    if RANK > 0:
        slot_b = b_of_slots(
            widen_ptr,
            index_ptr + slots,
            column,
            num_experts,
            D,
            rank,
            widen_expert,
            widen_row,
            widen_rank,
            K,
            SLOTS,
            RANK,
        )
    wait_for_last()
    begin(None, 0, cleared_ptr, False, CLEARS)
    for slot in tl.static_range(PARTS + K):
        place = hidden_ptr + (token * (PARTS + K) + slot) * I + step
        rows = rows + (tl.load(place, mask=step < I, other=0.0),)  # noqa: RUF005
    for slot in tl.static_range(K):
        weights = weights + (tl.load(weights_ptr + slots + slot),)  # noqa: RUF005
    if RANK > 0:
        wait_for(arrived_ptr + token, K * lows)
        low = weighted_low(low_ptr + slots * rank, weights_ptr + slots, rank, K, SLOTS, RANK)
    sums: tl.constexpr = BLOCK_A if STORED[0] == 0 else BLOCK_A // (BYTES * STORED[0])
    products, total = tl.zeros((BLOCK_C, sums), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    for part in tl.static_range(PARTS):
        products += times(rows[part].to(tl.float32), tiles[part], STORED, BLOCK_A)
    for slot in tl.static_range(K):
        of_slot = times(rows[PARTS + slot].to(tl.float32), tiles[PARTS + slot], STORED, BLOCK_A)
        products += weights[slot].to(tl.float32) * of_slot
        if BIASED:
            biased = column < tl.where(chosen[slot] < num_experts, D, 0)
            bias = tl.load(bias_ptr + chosen[slot] * D + column, mask=biased, other=0.0).to(tl.float32)
            total += weights[slot].to(tl.float32) * bias
    if RANK > 0:
        total += scaling * tl.sum(tl.sum(slot_b * low[None, :, :], axis=2), axis=1)
    total = (total + tl.sum(products, axis=1)).to(out_ptr.dtype.element_ty)
    if ADDS:
        residual = tl.load(residual_ptr + token * D + column, mask=inside, other=0.0).to(tl.float32)
        total = (total.to(tl.float32) + residual).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * D + column, total, mask=inside)


def beside(adapter: Adapter | None, turn: Turn | None, slots: int, depth: int) -> tuple[tuple, int, dict[str, int]]:
    """What a kernel is told of an adapter on so many slots' experts; its programs for A x of a slot, and their cut."""
    cut, clears = of_low(depth), {"CLEARS": 0 if turn is None else SITES}
    if adapter is None:
        return (None, None, None, 0, 0, 0, 0, 0, 1.0, *(turn or (None, None))), 0, cut | clears | {"RANK": 0}
    (_, rank, _), b = adapter.a.shape, adapter.b
    low, lows = torch.empty(slots, rank, dtype=adapter.a.dtype, device=b.device), triton.cdiv(rank, cut["BLOCK_R"])
    told = (adapter.a, low, b, rank, lows, *b.stride(), float(adapter.scaling), *turn)
    return told, lows, cut | clears | {"RANK": padded(rank)}


def activations(
    x: torch.Tensor,
    index: torch.Tensor | None,
    routed: Network | None,
    shared: Network | None,
    formula: Formula,
    size: int,
    parts: int,
    adapter: Adapter | None = None,
    turn: Turn | None = None,
) -> torch.Tensor:
    """What the networks have within: [T (P + K), size], of each token its parts first."""
    (tokens, dim), one, other = x.shape, routed or shared, shared or routed
    top_k = 0 if routed is None else index.shape[1]
    gate_bias, up_bias, _ = one.biases or (None, None, None)
    hidden = torch.empty(tokens * (parts + top_k), size, dtype=x.dtype, device=x.device)
    cut = sizes(dim, 1 if one.gate is None else 2, one.up.form)
    added, lows, of_adapter = beside(adapter, turn, tokens * top_k, dim)
    up_kernel[(tokens * (parts + top_k), lows + triton.cdiv(size, cut["BLOCK_C"]))](
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
        0 if routed is None else routed.up.shape[0],
        *one.up.strides,
        0 if up_bias is None else up_bias.stride(0),
        0 if shared is None else shared.up.shape[1],
        dim,
        size,
        top_k,
        parts,
        *added,
        **of_adapter,
        ROUTED=routed is not None,
        SHARED=shared is not None,
        GATED=one.gate is not None,
        BIASED=one.biases is not None,
        ACTIVATION=ACTIVATIONS[formula.activation],
        LIMIT=formula.limit,
        SHIFT=formula.shift,
        **settings(one.up, other.up),
        **cut,
        **OVERLAP,
    )
    return hidden


def mixture(
    x, weights, index, routed, shared, formula: Formula, residual, size: int, parts: int, adapters: OnExperts | None
) -> torch.Tensor:
    """`experts.mixture` of few tokens, `parts` parts of `size`."""
    (tokens, dim), one, other = x.shape, routed or shared, shared or routed
    top_k = 0 if routed is None else index.shape[1]
    width, form = 0 if shared is None else shared.up.shape[1], one.down.form
    on_up, on_down, turns = adapters or (None, None, (None, None))
    hidden = activations(x, index, routed, shared, formula, size, parts, on_up, turns[0])
    added, lows, of_adapter = beside(on_down, turns[1], tokens * top_k, size)
    out = torch.empty(tokens, dim, dtype=x.dtype, device=x.device)
    columns, block = SUM_COLUMNS[form], max(STEP[form], triton.next_power_of_2(size))
    least = SUM_LEAST[form] if parts + top_k <= SUM_SLOTS else 1
    sum_kernel[(tokens, top_k * lows + triton.cdiv(dim, columns))](
        hidden,
        one.down.pointers,
        None if one.biases is None else one.biases[2],
        other.down.pointers,
        index,
        weights,
        residual,
        out,
        0 if routed is None else routed.up.shape[0],
        *one.down.strides,
        width,
        dim,
        size,
        *added,
        K=top_k,
        SLOTS=triton.next_power_of_2(max(1, top_k)),
        PARTS=parts,
        **of_adapter,
        BIASED=one.biases is not None,
        ALIGNED=size % 16 == 0 and width % 16 == 0,
        ADDS=residual is not None,
        **settings(one.down, other.down, part=size),
        BLOCK_C=columns,
        BLOCK_A=block,
        num_warps=max(1, min(SUM_WARPS, columns * block // least)),
        **OVERLAP,
    )
    return out
