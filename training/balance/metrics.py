"""Routing metrics: counts that stay on the device while training, and what is logged of them.

Shapes: N steps, L routers, E routed experts. What one router did is a row of sums: tokens, sum of squared logsumexp,
dropped slots, sum of squared numbers of experts, each loss, tokens of each expert. Rows add up over batches and
processes.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from hf_moe.model.balancing import Statistics, expert_load

from .counts import Layers, together

TOKENS, SQUARED, DROPPED, SQUARED_K, FIRST_LOSS = range(5)


@torch.no_grad()
def rows(
    layers: list[Layers], counted: dict[str, Statistics], losses: dict[str, torch.Tensor], device: torch.device
) -> torch.Tensor:
    """The rows of one batch, one after the other in one vector. `counted` is this batch alone."""
    found, order = {}, {name: i for i, name in enumerate(counted)}
    for names, routing, batch in layers:
        mask_S = batch.mask_T if routing.token_S is None else batch.mask_T.gather(-1, routing.token_S)
        squared = (batch.logits_TE.logsumexp(dim=-1).square() * batch.mask_T).sum(dim=-1)
        dropped = ((routing.weights_SK == 0) & (routing.index_SK < routing.experts)) * mask_S.unsqueeze(-1)
        counts = together(counted, names, squared.device)
        places = [order[name] for name in names]
        shares = (torch.stack([value[i] for i in places]).to(squared) for value in losses.values())
        squared_k = (batch.chosen_TE.sum(dim=-1).square() * batch.mask_T).sum(dim=-1)
        sums = torch.stack([counts.tokens, squared, dropped.sum(dim=(-1, -2)), squared_k, *shares], dim=-1)
        found |= dict(zip(names, torch.cat([sums, counts.counts_E], dim=-1).to(device), strict=True))
    return torch.cat([found[name] for name in counted])


def split(flat: torch.Tensor, experts: list[int], losses: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sums [..., 4 + losses] and counts [..., E] of each router, out of rows one after the other."""
    width = FIRST_LOSS + losses
    sizes = [size for number in experts for size in (width, number)]
    parts = flat.split(sizes, dim=-1)
    return list(zip(parts[::2], parts[1::2], strict=True))


# ---- what is logged: one number a step and router, from sums [N, 4 + losses] and counts [N, E] ----


def load_max(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Load of the busiest expert beside the mean load: 1 at balance, E / K at most."""
    return expert_load(counts).amax(dim=-1)


def max_violation(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """MaxVio = max load / mean load - 1 (https://arxiv.org/abs/2408.15664, eq. 4): 0 at balance."""
    return load_max(sums, counts) - 1


def load_entropy(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Entropy of the experts' shares, divided by log E: 1 at balance, 0 where one expert gets all."""
    share = counts / counts.sum(dim=-1, keepdim=True).clamp_min(1)
    return torch.special.entr(share).sum(dim=-1) / max(math.log(counts.shape[-1]), 1e-9)


def dead_experts(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Experts that no token chose."""
    return (counts == 0).sum(dim=-1).float()


def dropped_fraction(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Share of the chosen slots whose weight is 0: over capacity, or dropped at random."""
    return sums[..., DROPPED] / counts.sum(dim=-1).clamp_min(1)


def experts_per_token(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean number of experts that a token chose: K, or less where a router leaves slots empty."""
    return counts.sum(dim=-1) / sums[..., TOKENS].clamp_min(1)


def experts_per_token_spread(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Its standard deviation over tokens: 0 where each has K."""
    mean = experts_per_token(sums, counts)
    return (sums[..., SQUARED_K] / sums[..., TOKENS].clamp_min(1) - mean.square()).clamp_min(0).sqrt()


def z_loss(sums: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean squared logsumexp of the router logits, not weighted."""
    return sums[..., SQUARED] / sums[..., TOKENS].clamp_min(1)


class Metric(NamedTuple):
    of: Callable  # sums, counts -> one number a step
    summary: Callable  # numbers of the routers [L] -> one


# Name in the log -> what it is, and how the routers' values become one.
METRICS = {
    "router_load_max": Metric(load_max, torch.mean),
    "router_max_violation": Metric(max_violation, torch.max),
    "router_load_entropy": Metric(load_entropy, torch.mean),
    "router_dead_experts": Metric(dead_experts, torch.sum),
    "router_dropped_fraction": Metric(dropped_fraction, torch.mean),
    "router_experts_per_token": Metric(experts_per_token, torch.mean),
    "router_experts_per_token_spread": Metric(experts_per_token_spread, torch.mean),
    "z_loss": Metric(z_loss, torch.mean),
}


def loss_name(coefficient: str) -> str:
    """router_aux_loss_coef -> aux_loss, seq_aux_loss_coef -> seq_aux_loss."""
    return coefficient.removeprefix("router_").removesuffix("_coef")


def summarize(
    steps: torch.Tensor, experts: dict[str, int], losses: list[str], biases: dict[str, torch.Tensor], each_router: bool
) -> dict[str, float]:
    """What to log of `steps` [N, rows of the routers in `experts`]: means over the steps.

    Of all routers together and, if asked, of each.
    """
    table = split(steps.cpu(), list(experts.values()), len(losses))
    values = {name: [metric.of(*rows).mean() for rows in table] for name, metric in METRICS.items()}
    summaries = {name: metric.summary for name, metric in METRICS.items()}
    for i, name in enumerate(losses):
        if loss_name(name) in METRICS:  # over all tokens rather than the mean of the batches' means
            continue
        values[loss_name(name)] = [sums[..., FIRST_LOSS + i].mean() for sums, _ in table]
        summaries[loss_name(name)] = torch.mean
    if biases.keys() == experts.keys():
        own = [bias.view(-1)[: experts[name]] for name, bias in biases.items()]
        ranges = torch.stack([(bias.max() - bias.min()).to(steps.device) for bias in own])
        values["router_bias_range"], summaries["router_bias_range"] = list(ranges.cpu()), torch.max
    logs = {name: summaries[name](torch.stack(numbers)).item() for name, numbers in values.items()}
    if each_router:
        for name, numbers in values.items():
            logs |= {f"{name}/{router}": x.item() for router, x in zip(experts, numbers, strict=True)}
    return logs
