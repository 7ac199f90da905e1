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
from .adapters import Adapter
from .norms import normalized
from .overlap import OVERLAP, let_next_start, wait_for_last
from .stored import BYTES, STEP, Weight, asked, columns_of, of_matrix, settings, times, weight_of

TILES, WARPS = (4096, 8192, 8192), 2  # weights of each form that a program holds, and its warps
SUM_COLUMNS, SUM_WARPS = (1, 2, 1), 4  # of the sum of experts
# Numbers of a row that a warp of it reads: of 4 bits a run a thread, which x reaches without shared memory, as long as
# its registers hold those of all slots.
SUM_LEAST, SUM_SLOTS = (1, 1, 1024), 8
MAX_SLOTS = 16  # whose weights it can hold
MAX_TOKENS = 4
LINEAR = Formula("linear")


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
def product_kernel(
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
    adapter,  # A x [T, rank] and B [C, rank] of each weight, and the scaling, 0 without one
    adapter2,
    adapter3,
    rank,
    TOKENS: tl.constexpr,
    WEIGHTS: tl.constexpr,
    NORMED: tl.constexpr,
    COUNTS: tl.constexpr,
    RANK: tl.constexpr,  # as a power of two; 0 without adapters
    STORED: tl.constexpr,  # `stored.settings`
    BLOCK_C: tl.constexpr,
    BLOCK_A: tl.constexpr,
):
    """Some columns of one of up to three products of x [T, A], or of its RMSNorm."""
    let_next_start()
    block, step = tl.program_id(0), columns_of(STORED, BLOCK_A)
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
        real = (place < rank) & (adapter[2] != 0.0)
        widen = adapter[1] + column[:, None] * rank + place[None, :]
        widen = tl.load(widen, mask=inside[:, None] & real[None, :], other=0.0).to(tl.float32)
    wait_for_last()
    if COUNTS:  # noqa: SIM102
        if tl.program_id(0) == 0:
            tl.store(count_ptr, tl.load(count_ptr) + counted)
    for row in tl.static_range(TOKENS):
        x = tl.load(x_ptr + row * x_row + step, mask=step < depth, other=0.0)
        if NORMED:  # of one tile
            x = normalized(x, norm, depth, eps, x.dtype)
        total = tl.sum(times(x.to(tl.float32), first, STORED, BLOCK_A), axis=1)
        for start in range(BLOCK_A, depth, BLOCK_A):
            x = tl.load(x_ptr + row * x_row + start + step, mask=step + start < depth, other=0.0)
            further = asked(weight, column, inside, start, depth, depth, STORED, BLOCK_A, False)
            total += tl.sum(times(x.to(tl.float32), further, STORED, BLOCK_A), axis=1)
        if RANK > 0:
            low = tl.load(adapter[0] + row * rank + place, mask=real, other=0.0).to(tl.float32)
            total += adapter[2] * tl.sum(low[None, :] * widen, axis=1)
        tl.store(out + row * width + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def sizes(depth: int, rows: int = 1, form: int = 0) -> dict[str, int]:
    """How a program's tile is cut, of as many registers for each column as `rows` of it take."""
    tile = TILES[form]
    block = max(STEP[form], min(tile, triton.next_power_of_2(depth)))
    return {"BLOCK_C": max(1, tile // block // triton.next_power_of_2(rows)), "BLOCK_A": block, "num_warps": WARPS}


def linear(
    x: torch.Tensor,
    weights: tuple[Weight, ...],
    norm: tuple[torch.Tensor, float] | None,
    counted: tuple[torch.Tensor, int] | None,
    adapters: Sequence[Adapter | None] = (),
    dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """x W^T [T, C] for each of one to three weights [C, A], of x [T, A] or its norm, whose depth a tile must hold.

    The first that is `counted` grows by the second. `adapters`, if there are any, are those of each weight.
    """
    depth, columns, first = x.shape[1], [weight.shape[0] for weight in weights], weights[0]
    cut, count = sizes(depth, len(x), first.form), len(weights)
    outs = [torch.empty(len(x), size, dtype=dtype or x.dtype, device=x.device) for size in columns]
    missing = [None] * (3 - count)
    pointers = [weight.pointers for weight in weights]
    pairs = [y for pair in zip([*pointers, *missing], outs + missing, strict=True) for y in pair]
    norm_weight, eps = norm or (None, 0.0)
    added, rank = lowered(x, norm, adapters)
    product_kernel[(sum(triton.cdiv(size, cut["BLOCK_C"]) for size in columns),)](
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
        TOKENS=len(x),
        WEIGHTS=count,
        NORMED=norm is not None,
        COUNTS=counted is not None,
        RANK=padded(rank),
        **settings(*weights),
        **cut,
        **OVERLAP,
    )
    return outs


def lowered(x: torch.Tensor, norm, adapters: Sequence[Adapter | None]) -> tuple[tuple[tuple, ...], int]:
    """What the kernel adds to each weight: A x, B and the scaling; and the rank, which is that of all of them."""
    real = [adapter for adapter in adapters if adapter is not None]
    if not real:
        return ((x, x, 0.0),) * 3, 0
    lows = linear(x, tuple(weight_of(adapter.a.data) for adapter in real), norm, None, dtype=real[0].a.dtype)
    none, each = (lows[0], real[0].b, 0.0), iter(lows)
    added = [none if adapter is None else (next(each), adapter.b, float(adapter.scaling)) for adapter in adapters]
    return (*added, *[none] * (3 - len(added))), real[0].b.shape[1]


def padded(rank: int) -> int:
    """As a power of two."""
    return max(16, triton.next_power_of_2(rank)) if rank else 0


@triton.jit
def rows_of_b(widen_ptr, column, inside, rank, widen_row, widen_rank, RANK: tl.constexpr):
    """[C, RANK] of B [., rank] of any strides."""
    step = tl.arange(0, RANK)
    place = widen_ptr + column[:, None].to(tl.int64) * widen_row + step[None, :] * widen_rank
    return tl.load(place, mask=inside[:, None] & (step < rank)[None, :], other=0.0).to(tl.float32)


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
    low_ptr,  # A x [T, K, rank] of the chosen experts
    widen_ptr,  # B [E, U, rank], U as of up: gate's rows come first
    rank,
    widen_expert,
    widen_row,
    widen_rank,
    scaling,
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
):
    """Some columns of one of a token's P parts of the shared network, which come first, or of a slot's expert."""
    token, program, step = tl.program_id(0) % tokens, tl.program_id(0) // tokens, columns_of(STORED, BLOCK_A)
    place = token * (parts + K) + program
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    wait_for_last()
    let_next_start()  # only now: the next one needs `index` before it waits
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
    of_up, of_gate = tl.zeros((BLOCK_C,), tl.float32), tl.zeros((BLOCK_C,), tl.float32)
    if RANK > 0:
        ranks, adapted = tl.arange(0, RANK), column < tl.where(program >= parts, width, 0)
        low_ptr += (token * K + tl.maximum(program - parts, 0)) * rank
        low = scaling * tl.load(low_ptr + ranks, mask=ranks < rank, other=0.0).to(tl.float32)
        widen_ptr += expert * widen_expert
        if GATED:
            gate_b = rows_of_b(widen_ptr, column, adapted, rank, widen_row, widen_rank, RANK)
            widen_ptr += I * widen_row
        up_b = rows_of_b(widen_ptr, column, adapted, rank, widen_row, widen_rank, RANK)
    for start in range(0, D, BLOCK_A):
        here = step + start < D
        tile = asked(up, row, inside, start, D, D, STORED, BLOCK_A, True)
        if GATED:
            gate_tile = asked(gate, row, inside, start, D, D, STORED, BLOCK_A, True)
        x = tl.load(x_ptr + token * D + start + step, mask=here, other=0.0).to(tl.float32)
        of_up += tl.sum(times(x, tile, STORED, BLOCK_A), axis=1)
        if GATED:
            of_gate += tl.sum(times(x, gate_tile, STORED, BLOCK_A), axis=1)
    if BIASED:
        biased = column < tl.where(program >= parts, width, 0)
        of_up += tl.load(up_bias_ptr + expert * bias_stride + column, mask=biased, other=0.0).to(tl.float32)
        if GATED:
            of_gate += tl.load(gate_bias_ptr + expert * bias_stride + column, mask=biased, other=0.0).to(tl.float32)
    if RANK > 0:
        of_up += tl.sum(low[None, :] * up_b, axis=1)
        if GATED:
            of_gate += tl.sum(low[None, :] * gate_b, axis=1)
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
    low = tl.load(low_ptr + slot[:, None] * rank + step[None, :], mask=mask, other=0.0)
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
    low_ptr,  # A h [T, K, rank] of the chosen experts
    widen_ptr,  # B [E, D, rank]
    rank,
    widen_expert,
    widen_row,
    widen_rank,
    scaling,
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
):
    """Some columns of the down-projections of all of a token's parts and slots, weighted, and their sum."""
    let_next_start()
    token, step = tl.program_id(0), columns_of(STORED, BLOCK_A)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, slots = column < D, token * K
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
    for slot in tl.static_range(PARTS + K):
        place = hidden_ptr + (token * (PARTS + K) + slot) * I + step
        rows = rows + (tl.load(place, mask=step < I, other=0.0),)  # noqa: RUF005
    for slot in tl.static_range(K):
        weights = weights + (tl.load(weights_ptr + slots + slot),)  # noqa: RUF005
    if RANK > 0:
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


def beside(adapter: Adapter | None, x: torch.Tensor, index: torch.Tensor | None) -> tuple[tuple, int]:
    """What a kernel for experts is told of an adapter on them, A x [T, K, r] with it; and its rank.

    x [T, .] or [T K, .], whose experts are index [T, K] or [T K, 1].
    """
    if adapter is None:
        return (None, None, 0, 0, 0, 0, 1.0), 0
    rank = adapter.a.shape[1]
    low = activations(x, index, Network(None, weight_of(adapter.a.data), None), None, LINEAR, rank, 0)
    return (low, adapter.b, rank, *adapter.b.stride(), float(adapter.scaling)), rank


def activations(
    x: torch.Tensor,
    index: torch.Tensor | None,
    routed: Network | None,
    shared: Network | None,
    formula: Formula,
    size: int,
    parts: int,
    adapter: Adapter | None = None,
) -> torch.Tensor:
    """What the networks have within: [T (P + K), size], of each token its parts first."""
    (tokens, dim), one, other = x.shape, routed or shared, shared or routed
    top_k = 0 if routed is None else index.shape[1]
    gate_bias, up_bias, _ = one.biases or (None, None, None)
    hidden = torch.empty(tokens * (parts + top_k), size, dtype=x.dtype, device=x.device)
    cut = sizes(dim, 1 if one.gate is None else 2, one.up.form)
    added, rank = beside(adapter, x, index)
    up_kernel[(tokens * (parts + top_k), triton.cdiv(size, cut["BLOCK_C"]))](
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
        RANK=padded(rank),
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
    x, weights, index, routed, shared, formula: Formula, residual, size: int, parts: int, adapters=(None, None)
) -> torch.Tensor:
    """`experts.mixture` of few tokens, `parts` parts of `size`; `adapters` on the routed up and down."""
    (tokens, dim), one, other = x.shape, routed or shared, shared or routed
    top_k = 0 if routed is None else index.shape[1]
    width, form = 0 if shared is None else shared.up.shape[1], one.down.form
    hidden = activations(x, index, routed, shared, formula, size, parts, adapters[0])
    added, rank = beside(None, x, index)
    if adapters[1] is not None:
        of_slots = hidden.view(tokens, parts + top_k, size)[:, parts:].reshape(tokens * top_k, size)
        added, rank = beside(adapters[1], of_slots, index.view(-1, 1))
    out = torch.empty(tokens, dim, dtype=x.dtype, device=x.device)
    columns, block = SUM_COLUMNS[form], max(STEP[form], triton.next_power_of_2(size))
    least = SUM_LEAST[form] if parts + top_k <= SUM_SLOTS else 1
    sum_kernel[(tokens, triton.cdiv(dim, columns))](
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
        RANK=padded(rank),
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
