"""A plugin that adds one of each thing that has a name: a loss, a metric, a reward and an upcycling strategy."""

import torch
from hf_moe.conversion.upcycling import UPCYCLERS
from hf_moe.conversion.upcycling.copy import Copy
from hf_moe.training.balance.metrics import METRICS, Metric
from hf_moe.training.stages.rewards import REWARDS

from hf_moe.model.balancing import LOSSES, expert_load


def variance_loss(batch, counted, config):
    """The variance of the experts' mean scores times E squared: 0 at balance."""
    share_E = (batch.affinity_TE * batch.mask_T.unsqueeze(-1)).sum(dim=-2) / counted.tokens.unsqueeze(-1)
    return share_E.var(dim=-1, correction=0) * share_E.shape[-1] ** 2


def least_load(sums, counts):
    return expert_load(counts).amin(dim=-1)


def short(completions, **columns):
    return [-float(len(str(completion))) for completion in completions]


class Again(Copy):
    """As copy."""


LOSSES["variance_loss_coef"] = variance_loss
METRICS["router_load_min"] = Metric(least_load, torch.mean)
REWARDS["short"] = short
UPCYCLERS["again"] = Again
