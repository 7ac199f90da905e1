"""The experts of a layer and linear layers in FP8, forward and backward: which kernels, in which order.

Kept for the backward: x and the up-projection in FP8, and the routing.
"""

from functools import lru_cache, partial

import torch

from ..feed_forward import on, slots_of
from ..formula import Formula
from ..layer import Experts
from ..routing_metadata import Routing, empty_routing, route
from ..token_rows import combine
from .activation_backward import activation_backward
from .copies import in_blocks
from .format import BLOCK, CODE, Tiles, up_to_blocks
from .product import product
from .quantise import tiles_of, turned
from .up_projection import up_projection
from .weight_gradient import weight_gradient


def layer(top_k: int, down: torch.Tensor, formula: Formula) -> Experts:
    """What launches share. An expert's rows fill whole tiles of 128, so that what shares a scale is one expert's."""
    return Experts(len(down), down.shape[2], top_k, formula, BLOCK)


def up(x, index, weights, up, down, formula: Formula, save: bool) -> tuple[Tiles, Tiles, Tiles, Routing]:
    """The activations in rows, the up-projection in places (none unless `save`), x in tiles, and the routing."""
    experts = layer(index.shape[1], down, formula)
    if index.numel() == 0:
        routing = empty_routing(index, experts.num_experts)
        sizes = (experts.row_tiles(routing) * BLOCK, experts.inner), (0, experts.halves * experts.inner), x.shape
        return *(unwritten(x.device, *size) for size in sizes), routing
    with on(x.device):
        routing = route(index, weights, experts.num_experts, experts.tile, skip_zero=not save)
        tiles = tiles_of(x)
        hidden, activated = up_projection(tiles, in_blocks(up)[0], experts, routing, save)
    return activated, hidden, tiles, routing


def unwritten(device: torch.device, rows: int, columns: int) -> Tiles:
    """What stands for rows where no kernel runs."""
    codes = torch.empty(rows, columns, dtype=CODE, device=device)
    return Tiles(codes, torch.empty(up_to_blocks(columns) // BLOCK, rows, device=device))


def down(like, activated: Tiles, index, weights, down, routing: Routing) -> torch.Tensor:
    """The sum [T, D] over a token's experts of the activations by `down`, times their weights."""
    if index.numel() == 0:
        return like.new_zeros(like.shape)
    experts = layer(index.shape[1], down, Formula("linear"))
    with on(weights.device):
        rows = product(activated, in_blocks(down)[0], like.dtype, experts, routing)
        return combine(rows, weights, experts, routing)


def backward(
    grad, x: Tiles, index, weights, up, down, hidden: Tiles, routing: Routing, formula: Formula, needs
) -> list[torch.Tensor]:
    """Gradients of those of x, weights, up and down that `needs` marks, in this order."""
    need_x, need_weights, need_up, need_down = needs
    if index.numel() == 0:
        return [
            torch.zeros_like(tensor) for tensor, need in zip((grad, weights, up, down), needs, strict=True) if need
        ]
    experts = layer(index.shape[1], down, formula)
    gradients = []
    with on(grad.device):
        of_output = tiles_of(grad)
        rows = product(of_output, in_blocks(down)[1], grad.dtype, experts, routing, gathered=True)
        grad_hidden, weighted, scores = activation_backward(
            rows, hidden, weights, experts, routing, need_x or need_up, need_down
        )
        del rows
        if need_x:
            rows = product(grad_hidden, in_blocks(up)[1], grad.dtype, experts, routing)
            gradients.append(combine(rows, None, experts, routing))
            del rows
        if need_weights:
            slots = slots_of(scores.sum(0).unsqueeze(1), routing)
            gradients.append(slots.view(weights.shape).to(weights.dtype))
        turn = partial(turned, experts=experts, routing=routing)
        if need_up:
            sides = turn(grad_hidden, gathered=False), turn(x, gathered=True)
            gradients.append(weight_gradient(*sides, up.dtype, experts, routing))
            del sides
        if need_down:
            sides = turn(of_output, gathered=True), turn(weighted, gathered=False)
            gradients.append(weight_gradient(*sides, down.dtype, experts, routing))
    return gradients


@lru_cache(8)
def dense(rows: int, device: torch.device) -> tuple[Experts, Routing]:
    """A linear layer is one expert that every row has chosen, in order."""
    tiles = up_to_blocks(rows) // BLOCK
    row = torch.arange((rows // BLOCK + 1) * BLOCK, dtype=torch.int32, device=device)
    slot_of_row = row.masked_fill(row >= rows, -1)
    offsets = torch.tensor([[0, rows], [0, tiles]], dtype=torch.int32, device=device)
    places = torch.arange(0, tiles * BLOCK, BLOCK, dtype=torch.int32, device=device)
    routing = Routing(slot_of_row, row[:rows], offsets, torch.stack([torch.zeros_like(places), places], 1))
    return Experts(1, 0, 1, Formula("linear", gated=False), BLOCK), routing


def linear(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, Tiles]:
    """x [T, K] by a weight [N, K], and x in tiles."""
    if len(x) == 0:
        return x.new_empty(0, len(weight)), unwritten(x.device, *x.shape)
    with on(x.device):
        tiles = tiles_of(x)
        return product(tiles, in_blocks(weight)[0], x.dtype, *dense(len(x), x.device))[: len(x)], tiles


def linear_backward(grad: torch.Tensor, x: Tiles, weight: torch.Tensor, needs) -> list[torch.Tensor]:
    """Gradients of those of x and weight that `needs` marks."""
    need_x, need_weight = needs
    if len(grad) == 0:
        both = (grad.new_empty(0, weight.shape[1]), torch.zeros_like(weight))
        return [tensor for tensor, need in zip(both, needs, strict=True) if need]
    gradients, (experts, routing) = [], dense(len(grad), grad.device)
    with on(grad.device):
        tiles = tiles_of(grad)
        if need_x:
            gradients.append(product(tiles, in_blocks(weight)[1], grad.dtype, experts, routing)[: len(grad)])
        if need_weight:
            sides = [turned(side, experts, routing, gathered=True) for side in (tiles, x)]
            gradients.append(weight_gradient(*sides, weight.dtype, experts, routing)[0])
    return gradients
