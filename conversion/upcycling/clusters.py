"""Neurons in groups of equal size: which of them work on the same tokens.

Shapes: T tokens of the calibration text, I neurons, E groups.
"""

import torch

from .strategy import Layer

ITERATIONS = 20


def activity(layer: Layer) -> torch.Tensor:
    """What each neuron adds to the output at each calibration token, |h_i| times its column's norm: [T, I]."""
    hidden = layer.neurons(layer.evidence.inputs(layer.index))
    return hidden.abs_().mul_(layer.network["down_proj.weight"].float().norm(dim=0))


def busiest_first(activity: torch.Tensor) -> torch.Tensor:
    """The neurons by the mean square of their `activity` [T, I], the largest first: [I].

    CMoE counts the tokens on which a neuron is among the largest; perplexity after carving is lower with this.
    """
    return activity.square().mean(dim=0).argsort(descending=True, stable=True)


def balanced_clusters(features: torch.Tensor, groups: int, generator: torch.Generator) -> torch.Tensor:
    """Groups of equal size of the rows of `features` [I, F], by spherical k-means: indices [E, I / E], sorted."""
    features = torch.nn.functional.normalize(features, dim=-1)
    size = len(features) // groups
    centres = features[torch.randperm(len(features), generator=generator)[:groups]]
    before = None
    for _ in range(ITERATIONS):
        group = balanced_assignment(features @ centres.T, size)
        if before is not None and torch.equal(group, before):
            break
        before = group
        sums = torch.zeros_like(centres).index_add_(0, group, features)
        centres = torch.nn.functional.normalize(sums, dim=-1)
    return group.argsort(stable=True).view(groups, size)


def balanced_assignment(scores: torch.Tensor, size: int) -> torch.Tensor:
    """The group of each row of `scores` [I, E], `size` rows a group: [I].

    Rows ask for their best group, groups keep those that score highest and turn the others away, until all have a
    place (deferred acceptance, Gale and Shapley 1962).
    """
    rows, groups = scores.shape
    assert rows == groups * size
    open_scores, group = scores.clone(), torch.full((rows,), -1)
    while (free := (group < 0).nonzero().squeeze(-1)).numel():
        group[free] = open_scores[free].argmax(dim=-1)
        for index in range(groups):
            holders = (group == index).nonzero().squeeze(-1)
            if len(holders) > size:
                turned_away = holders[scores[holders, index].argsort(descending=True, stable=True)[size:]]
                group[turned_away] = -1
                open_scores[turned_away, index] = -torch.inf
    return group
