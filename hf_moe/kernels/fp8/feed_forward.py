"""The experts of a layer and linear layers in FP8, forward and backward: which kernels, in which order.

Kept for the backward: x, the up-projection in FP8, and the routing. Gradients of weights, and what an adapter adds
(..low_rank), the other kernels compute, in the type of x.
"""

from functools import lru_cache

import torch

from ..feed_forward import on, rows_of, slots_of
from ..formula import Formula
from ..grouped_product import product as product_in_bf16
from ..layer import Experts
from ..low_rank import places
from ..routing_metadata import Routing, empty_routing, route
from ..token_rows import combine, gather
from ..weight_gradient import weight_gradient
from .activation_backward import activation_backward
from .copies import in_blocks
from .format import BLOCK, CODE, Blocks, Tiles, up_to_blocks
from .product import product
from .quantise import tiles_of
from .up_projection import up_projection


def layer(top_k: int, down: torch.Tensor, formula: Formula) -> Experts:
    """What launches share. An expert's rows fill whole tiles of 128, so that what shares a scale is one expert's."""
    return Experts(len(down), down.shape[2], top_k, formula, BLOCK)


def up(
    x, index, weights, up, down, low, widen, formula: Formula, save: bool, plain: bool
) -> tuple[Tiles, Tiles, torch.Tensor, Routing]:
    """Activations in rows, the up-projection in places (none unless `save`), activations before they were quantised
    (no rows unless `plain`), and the routing."""
    experts = layer(index.shape[1], down, formula)
    if index.numel() == 0:
        routing = empty_routing(index, experts.num_experts)
        rows = experts.row_tiles(routing) * BLOCK
        sizes = (rows, experts.inner), (0, experts.halves * experts.inner)
        exact = x.new_empty(rows if plain else 0, experts.inner)
        return *(unwritten(x.device, *size) for size in sizes), exact, routing
    with on(x.device):
        routing = route(index, weights, experts.num_experts, experts.tile, skip_zero=not save)
        blocks, _ = in_blocks(up)
        rest = (low, widen, x.dtype, experts, routing, save, plain)
        hidden, activated, exact = up_projection(tiles_of(x), blocks, *rest)
    return activated, hidden, exact, routing


def narrowed(plain, index, weights, narrow, down, routing: Routing) -> torch.Tensor:
    """[T, K, r]: the activations in rows by `narrow`, times their weights."""
    if index.numel() == 0:
        return plain.new_zeros(*index.shape, narrow.shape[1])
    experts = layer(index.shape[1], down, Formula("linear"))
    with on(plain.device):
        slots = slots_of(product_in_bf16(plain, narrow, None, True, experts, routing, kernel="narrow"), routing)
    return slots.view(*index.shape, -1) * weights.unsqueeze(-1)


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
    grad,
    grad_narrowed,
    x,
    index,
    weights,
    up,
    down,
    low,
    widen,
    narrow,
    hidden: Tiles,
    routing: Routing,
    formula: Formula,
    needs,
) -> list[torch.Tensor]:
    """Gradients of those of operators.NAMES that `needs` marks, in this order."""
    if index.numel() == 0:
        inputs = zip((grad, weights, up, down, low, widen, narrow), needs, strict=True)
        return [torch.zeros_like(tensor) for tensor, need in inputs if need]
    need_x, need_weights, need_up, need_down, need_low, need_widen, need_narrow = needs
    grad_x = grad_weights = grad_up = grad_down = grad_low = grad_widen = grad_narrow = None
    experts = layer(index.shape[1], down, formula)
    with on(grad.device):
        of_narrowed = back = None
        if grad_narrowed is not None and narrow is not None:
            like = grad_narrowed.new_empty(experts.row_tiles(routing) * BLOCK, 0)
            of_narrowed, back = rows_of(grad_narrowed.flatten(0, 1), like, routing), narrow.mT.contiguous()
        activated = product(tiles_of(grad), in_blocks(down)[1], grad.dtype, experts, routing, True, of_narrowed, back)
        tiles, grad_hidden, scores = activation_backward(
            activated,
            hidden,
            weights,
            experts,
            routing,
            need_x,
            need_up or need_low or need_widen,
            need_down or need_narrow,
        )
        if need_weights:
            slots = slots_of(scores.sum(0).unsqueeze(1), routing)
            grad_weights = slots.view(weights.shape).to(weights.dtype)
        if need_down:
            grad_down = weight_gradient(gather(grad, experts, routing), activated, experts, routing, down.dtype)
        if need_narrow and of_narrowed is None:
            grad_narrow = torch.zeros_like(narrow)
        elif need_narrow:
            grad_narrow = weight_gradient(of_narrowed, activated, experts, routing)
        del activated
        if need_x:
            rows = product(tiles, in_blocks(up)[1], grad.dtype, experts, routing)
            grad_x = combine(rows, None, experts, routing)
            del rows, tiles
        if need_up:
            grad_up = weight_gradient(grad_hidden, gather(x, experts, routing), experts, routing, up.dtype)
        if need_widen:
            chosen = low.gather(1, places(index, low)).flatten(0, 1)
            grad_widen = weight_gradient(grad_hidden, rows_of(chosen, grad_hidden, routing), experts, routing)
        if need_low:
            rows = product_in_bf16(grad_hidden, widen, None, False, experts, routing, kernel="narrow")
            grad_low = torch.zeros_like(low)
            grad_low.scatter_add_(1, places(index, low), slots_of(rows, routing).view(*index.shape, -1))
    gradients = (grad_x, grad_weights, grad_up, grad_down, grad_low, grad_widen, grad_narrow)
    return [gradient for gradient, need in zip(gradients, needs, strict=True) if need]


@lru_cache(8)
def dense(rows: int, device: torch.device) -> tuple[Experts, Routing]:
    """A linear layer is one expert that every row has chosen, in order."""
    tiles = up_to_blocks(rows) // BLOCK
    row = torch.arange((rows // BLOCK + 1) * BLOCK, dtype=torch.int32, device=device)
    slot_of_row = row.masked_fill(row >= rows, -1)
    offsets = torch.tensor([[0, rows], [0, tiles]], dtype=torch.int32, device=device)
    firsts = torch.arange(0, tiles * BLOCK, BLOCK, dtype=torch.int32, device=device)
    routing = Routing(slot_of_row, row[:rows], offsets, torch.stack([torch.zeros_like(firsts), firsts], 1))
    return Experts(1, 0, 1, Formula("linear", gated=False), BLOCK), routing


def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [T, K] by a weight [N, K]."""
    return by_blocks(x, len(weight), in_blocks(weight)[0])


def linear_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, needs) -> list[torch.Tensor]:
    """Gradients of those of x and weight that `needs` marks."""
    need_x, need_weight = needs
    gradients = [by_blocks(grad, weight.shape[1], in_blocks(weight)[1])] if need_x else []
    return gradients + ([(grad.mT @ x).to(weight.dtype)] if need_weight else [])


def by_blocks(x: torch.Tensor, columns: int, blocks: Blocks) -> torch.Tensor:
    if len(x) == 0:
        return x.new_empty(0, columns)
    with on(x.device):
        return product(tiles_of(x), blocks, x.dtype, *dense(len(x), x.device))[: len(x)]
