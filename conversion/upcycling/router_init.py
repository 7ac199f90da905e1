"""How a router starts: one row for each expert, or for each virtual group of experts.

Every way but zero gives rows of the same size on average, `router_std` a number. What all rows have in common changes
neither the choice nor the weights, so the ways that read texts take it out.

Shapes: E rows, D hidden size, T tokens of the calibration text.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from .strategy import REQUIRED, Layer, Strategy

ITERATIONS = 20
RIDGE = 0.1  # of the mean variance, added to each
Options = Mapping[str, Any]


class RouterInit(NamedTuple):
    """rows: strategy of the layer, own options -> [E, D] float32. options: as a strategy's. uniform: equal rows."""

    rows: Callable[[Strategy, Options], torch.Tensor]
    options: Options
    uniform: bool = False


def normal(strategy: Strategy, options: Options) -> torch.Tensor:
    """N(0, router_std) (Sparse Upcycling, https://arxiv.org/abs/2212.05055, A.1)."""
    layer, experts = strategy.layer, strategy.request.experts
    return torch.empty(experts, layer.hidden_size).normal_(
        std=options["router_std"], generator=layer.generator("router")
    )


def zero(strategy: Strategy, options: Options) -> torch.Tensor:
    """All experts weigh alike; which of them are taken is not defined until training moves the router."""
    return torch.zeros(strategy.request.experts, strategy.layer.hidden_size)


def hidden(strategy: Strategy, options: Options) -> torch.Tensor:
    """The mean input of the layer's network over each expert's prompts."""
    return contrasted(strategy.layer.evidence.prompt_states(strategy.layer.index), options["router_std"])


def cheap_embed(strategy: Strategy, options: Options) -> torch.Tensor:
    """The mean token embedding of each expert's prompts, the same in every layer; needs no forward pass."""
    return contrasted(strategy.layer.evidence.prompt_embeddings(), options["router_std"])


def centroids(strategy: Strategy, options: Options) -> torch.Tensor:
    """Centroids of the calibration tokens: of a k-means, or for experts that differ those of the tokens they work on.

    There a token counts for an expert as much as the expert adds to it, and the rows are C^-1 (centroid - mean) with
    the tokens' covariance C, as in a linear discriminant: what varies in all tokens tells no expert apart.
    """
    inputs = strategy.layer.evidence.inputs(strategy.layer.index)
    if strategy.affinity is None:
        return contrasted(k_means(inputs, strategy.request.experts, strategy.layer), options["router_std"])
    share = torch.nn.functional.normalize(strategy.affinity, p=1, dim=0)
    inputs = inputs - inputs.mean(dim=0)
    covariance = inputs.T @ inputs / len(inputs)
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    return contrasted(torch.linalg.solve(covariance, inputs.T @ share).T, options["router_std"])


def contrasted(rows: torch.Tensor, std: float) -> torch.Tensor:
    """Rows [E, D] less their mean, each with `std` for its root mean square."""
    return torch.nn.functional.normalize(rows - rows.mean(dim=0), dim=-1) * std * rows.shape[-1] ** 0.5


def k_means(inputs: torch.Tensor, count: int, layer: Layer) -> torch.Tensor:
    """Lloyd's k-means of directions [T, D]: the centroids [count, D]. One that loses its tokens stays where it is."""
    if len(inputs) < count:
        raise ValueError(f"The calibration text has {len(inputs)} tokens, too few for {count} experts.")
    inputs = torch.nn.functional.normalize(inputs - inputs.mean(dim=0), dim=-1)
    centres = inputs[torch.randperm(len(inputs), generator=layer.generator("router"))[:count]]
    for _ in range(ITERATIONS):
        nearest = (inputs @ centres.T).argmax(dim=-1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, inputs)
        held = torch.bincount(nearest, minlength=count) > 0
        centres = torch.where(held[:, None], torch.nn.functional.normalize(sums, dim=-1), centres)
    return centres


ROUTER_INITS: dict[str, RouterInit] = {
    "normal": RouterInit(normal, {"router_std": 0.02}),
    "zero": RouterInit(zero, {}, uniform=True),
    "hidden": RouterInit(hidden, {"prompts": REQUIRED, "router_std": 0.02}),
    "cheap_embed": RouterInit(cheap_embed, {"prompts": REQUIRED, "router_std": 0.02}),
    "centroids": RouterInit(centroids, {"calibration": REQUIRED, "router_std": 0.02}),
}
