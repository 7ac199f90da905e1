"""Where each (token, expert) slot goes: a stable counting sort by expert, in two launches and without a host sync.

Slot s = t K + k is the k-th choice of token t. Rows are slots in the order of their experts, each expert's filled up
to whole tiles: tile i has the rows i R to (i + 1) R, so that products need no care at an expert's end. Saved tensors
do without the filling: there expert e has the places offsets[0, e] to offsets[0, e + 1]. A slot whose index is no
expert (E: an expert on another rank, or dropped) gets no row, so that no later kernel does anything for it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .launch import FUSED
from .routing_sizes import routing_sizes

CHUNK = 512  # slots that one program counts and places


class Routing(NamedTuple):
    """slot_of_row [S + 128 E]: -1 where a row is filling, undefined behind the last tile; row_of_slot [S]: -1 where a
    slot has no row; offsets [2, E + 1]: the first place and the first tile of each expert, in the end their numbers;
    tiles [M, 2]: expert and first place of each tile. All int32.
    """

    slot_of_row: torch.Tensor
    row_of_slot: torch.Tensor
    offsets: torch.Tensor
    tiles: torch.Tensor


def empty_routing(index: torch.Tensor, num_experts: int) -> Routing:
    """Uninitialised metadata for `index` [T, K]."""
    sizes = routing_sizes(index.numel(), num_experts)
    return Routing(*(index.new_empty(size, dtype=torch.int32) for size in sizes))


def route(index: torch.Tensor, weights: torch.Tensor, num_experts: int, tile: int, skip_zero: bool) -> Routing:
    """Sort the slots of `index` [T, K] by expert, with tiles of `tile` rows; `skip_zero` drops slots of weight 0."""
    routing = empty_routing(index, num_experts)
    experts = max(16, triton.next_power_of_2(num_experts))
    chunks = triton.cdiv(index.numel(), CHUNK)
    counts = torch.empty(chunks, experts, dtype=torch.int32, device=index.device)
    sizes = {"num_slots": index.numel(), "num_experts": num_experts}
    shapes = {"SKIP_ZERO": skip_zero, "CHUNK": CHUNK, "EXPERTS": experts}
    count_kernel[(chunks,)](index, weights, counts, **sizes, **shapes, num_warps=4, **FUSED)
    per_program = max(16, triton.next_power_of_2(triton.cdiv(len(routing.tiles), chunks)))
    shapes |= {"TILE": tile, "TILES": per_program, "num_warps": 8} | FUSED
    place_kernel[(chunks,)](index, weights, counts, *routing, **sizes, **shapes)
    return routing


@triton.jit
def expert_of(index, weights, slots, num_slots, num_experts, SKIP_ZERO: tl.constexpr):
    inside = slots < num_slots
    expert = tl.load(index + slots, mask=inside, other=num_experts).to(tl.int32)
    here = (expert >= 0) & (expert < num_experts)
    if SKIP_ZERO:
        here = here & (tl.load(weights + slots, mask=inside, other=0.0) != 0)
    return tl.where(here, expert, num_experts)


@triton.jit
def count_kernel(
    index,
    weights,
    counts,
    num_slots,
    num_experts,
    SKIP_ZERO: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    chunk = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    count = tl.zeros([32, EXPERTS], tl.int32)  # summed after the loop: a sum within it is a barrier each time
    for first in range(0, CHUNK, 32):
        slots = chunk * CHUNK + first + tl.arange(0, 32)
        chosen = expert_of(index, weights, slots, num_slots, num_experts, SKIP_ZERO)
        count += (chosen[:, None] == experts[None, :]).to(tl.int32)
    tl.store(counts + chunk * EXPERTS + experts, tl.where(experts < num_experts, tl.sum(count, 0), 0))


@triton.jit
def place_kernel(
    index,
    weights,
    counts,
    slot_of_row,
    row_of_slot,
    offsets,
    tiles,
    num_slots,
    num_experts,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    SKIP_ZERO: tl.constexpr,
    CHUNK: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    chunk, chunks = tl.program_id(0), tl.num_programs(0)
    experts = tl.arange(0, EXPERTS)
    # Every program sums all counts again: that costs less than a launch between.
    total = tl.zeros([32, EXPERTS], tl.int32)
    before = tl.zeros([32, EXPERTS], tl.int32)
    for first in range(0, chunks, 32):
        others = first + tl.arange(0, 32)[:, None]
        count = tl.load(counts + others * EXPERTS + experts[None, :], mask=others < chunks, other=0)
        total += count
        before += tl.where(others < chunk, count, 0)
    total, before = tl.sum(total, 0), tl.sum(before, 0)
    ends = tl.cumsum(total, 0)
    starts = ends - total
    tile_count = (total + TILE - 1) // TILE
    tile_ends = tl.cumsum(tile_count, 0)
    tile_starts = tile_ends - tile_count
    if chunk == 0:
        tl.store(offsets, 0)
        tl.store(offsets + num_experts + 1, 0)
        tl.store(offsets + 1 + experts, ends, mask=experts < num_experts)
        tl.store(offsets + num_experts + 2 + experts, tile_ends, mask=experts < num_experts)

    slots = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = expert_of(index, weights, slots, num_slots, num_experts, SKIP_ZERO)
    earlier_same = tl.zeros([CHUNK, 32], tl.int32)
    for first in range(0, CHUNK, 32):
        earlier = chunk * CHUNK + first + tl.arange(0, 32)
        chosen = expert_of(index, weights, earlier, num_slots, num_experts, SKIP_ZERO)
        same = (chosen[None, :] == expert[:, None]) & (earlier[None, :] < slots[:, None])
        earlier_same += same.to(tl.int32)
    row = tl.gather(tile_starts * TILE + before, tl.minimum(expert, EXPERTS - 1), 0) + tl.sum(earlier_same, 1)
    here = expert < num_experts
    tl.store(row_of_slot + slots, tl.where(here, row, -1), mask=slots < num_slots)
    tl.store(slot_of_row + row, slots, mask=here)

    tile = chunk * TILES + tl.arange(0, TILES)
    owner = tl.sum((tile_ends[None, :] <= tile[:, None]).to(tl.int32), 1)
    known = tl.minimum(owner, EXPERTS - 1)
    within = (tile - tl.gather(tile_starts, known, 0)) * TILE
    real = owner < num_experts
    tl.store(tiles + 2 * tile, owner, mask=real)
    tl.store(tiles + 2 * tile + 1, tl.gather(starts, known, 0) + within, mask=real)
    left = tl.gather(total, known, 0) - within
    for first in range(0, TILE, 16):
        places = first + tl.arange(0, 16)[None, :]
        filling = real[:, None] & (places >= left[:, None])
        tl.store(slot_of_row + tile[:, None] * TILE + places, tl.full([TILES, 16], -1, tl.int32), mask=filling)
