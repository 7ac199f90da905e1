"""Losses that keep the experts busy and the router calm: pure functions of one layer's routing.

Shape suffixes: T tokens, B sequences, E routed experts, G expert groups (devices). Each loss is per layer, and the
model averages over its routers. (Pooling the layers before the product, as done elsewhere, lets opposite
imbalances cancel.) Padding never counts. Every tensor may have one more dimension before these, the layers; a loss
then has it, too: with one launch for all layers.

A load (who was chosen how often) carries no gradient, so a loss is split in two: `statistics` counts, and the loss
weighs this batch's scores by the counts. Counts of one batch give that batch's loss. Counts summed over the
micro-batches and processes of a step give each its share of the step's loss: the shares, and their gradients, add up
to those of one large batch.
"""

from typing import NamedTuple

import torch
from transformers import PreTrainedConfig


class Routed(NamedTuple):
    """What one router did with one batch."""

    logits_TE: torch.Tensor  # behind the experts' those of null experts, if any
    affinity_TE: torch.Tensor  # scores s_{i,t} that sum to 1 over the experts
    chosen_TE: torch.Tensor  # True where expert i was chosen for token t, dropped later or not
    mask_T: torch.Tensor  # 1 where a token counts, 0 on padding; float32
    sequences: int  # B; T / B tokens each


class Statistics(NamedTuple):
    """Counts that add up over batches and processes."""

    tokens: torch.Tensor  # scalar
    sequences: torch.Tensor  # scalar; those with at least one token that counts
    counts_E: torch.Tensor  # tokens that chose each expert
    sent_G: torch.Tensor  # tokens that chose any expert of each group


def routed(
    logits_TE: torch.Tensor,
    affinity_TE: torch.Tensor,
    index_TK: torch.Tensor,
    mask_T: torch.Tensor | None = None,
    token_S: torch.Tensor | None = None,
    sequences: int = 1,
) -> Routed:
    """Collect one router's outputs. `token_S` names the token of each row of the index; None: row t is token t.

    Scores are divided by their sum: that leaves a softmax as it is and makes sigmoids a distribution (DeepSeek-V3,
    eq. 19). There may be more logits than experts have scores: the further ones are of null experts.
    """
    if mask_T is None:
        mask_T = torch.ones_like(logits_TE[..., 0])
    rows_T = torch.arange(index_TK.shape[-2], device=index_TK.device) if token_S is None else token_S
    *shape, experts = affinity_TE.shape
    chosen_TE = torch.zeros(*shape, experts + 1, dtype=torch.bool, device=logits_TE.device)  # the last: an empty slot
    places_TK = rows_T.unsqueeze(-1) * (experts + 1) + index_TK.clamp(max=experts)
    chosen_TE.flatten(-2).scatter_(-1, places_TK.flatten(-2), True)  # a view
    chosen_TE = chosen_TE[..., :experts]
    # The smallest normal float32: no 0 / 0 where every ReLU is closed, no change elsewhere.
    sums_T1 = affinity_TE.float().sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    affinity_TE = affinity_TE.float() / sums_T1
    return Routed(logits_TE.float(), affinity_TE, chosen_TE, mask_T.to(logits_TE.device).float(), sequences)


@torch.no_grad()
def statistics(batch: Routed, n_group: int = 1) -> Statistics:
    """Count one batch."""
    counted_TE = batch.chosen_TE * batch.mask_T.unsqueeze(-1)
    groups_TGE = counted_TE.unflatten(-1, (n_group, -1))
    return Statistics(
        tokens=batch.mask_T.sum(dim=-1),
        sequences=(batch.mask_T.unflatten(-1, (batch.sequences, -1)).sum(dim=-1) > 0).sum(dim=-1).float(),
        counts_E=counted_TE.sum(dim=-2),
        sent_G=groups_TGE.amax(dim=-1).sum(dim=-2),
    )


# ---- loads: 1 for every expert at perfect balance ----


def expert_load(counts_E: torch.Tensor) -> torch.Tensor:
    """f_i = E / (K T) count_i (DeepSeekMoE, https://arxiv.org/abs/2401.06066, eq. 13); K T: the counts' sum."""
    return counts_E * counts_E.shape[-1] / counts_E.sum(dim=-1, keepdim=True).clamp_min(1.0)


@torch.no_grad()
def exceeded_by(scores_TE: torch.Tensor, share: float, mask_T: torch.Tensor) -> torch.Tensor:
    """Each expert's score that a `share` of the tokens that count exceed, its (1 - share) quantile: [E].

    A score of a token, without interpolation: round(share T) tokens are above it, but for ties, or all but one. 0
    where no token counts.
    """
    tokens = mask_T.sum()
    ranked_TE = scores_TE.masked_fill((mask_T == 0).unsqueeze(-1), -torch.inf).sort(dim=0, descending=True).values
    place = (share * tokens).round().clamp(max=tokens - 1).clamp(min=0).long()
    return torch.where(tokens > 0, ranked_TE.index_select(0, place.view(1)).squeeze(0), 0.0)


def spread_over_experts(load_G: torch.Tensor, num_experts: int) -> torch.Tensor:
    return load_G.repeat_interleave(num_experts // load_G.shape[-1], dim=-1)


# ---- losses ----


def weighted_affinity(batch: Routed, load_E: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """sum_i load_i P_i, with P_i = sum_t s_{i,t} / tokens."""
    P_E = (batch.affinity_TE * batch.mask_T.unsqueeze(-1)).sum(dim=-2) / tokens.clamp_min(1.0).unsqueeze(-1)
    return (load_E * P_E).sum(dim=-1)


def expert_loss(batch: Routed, counted: Statistics, config: PreTrainedConfig) -> torch.Tensor:
    """sum_i f_i P_i: the load-balancing loss.

    Switch (https://arxiv.org/abs/2101.03961, eq. 4-6) at K = 1, DeepSeekMoE's expert loss (eq. 12-14) at any K. At
    perfect balance it is 1 whatever E and K are (Transformers' is K there), and E / K when every token goes to the
    same K experts with all its probability.
    """
    return weighted_affinity(batch, expert_load(counted.counts_E), counted.tokens)


def device_loss(batch: Routed, counted: Statistics, config: PreTrainedConfig) -> torch.Tensor:
    """sum_d f'_d P'_d, f'_d the mean of f over group d, P'_d the sum of P (DeepSeekMoE, eq. 15-17). 1 at balance."""
    load_E = expert_load(counted.counts_E)
    num_experts, groups = load_E.shape[-1], counted.sent_G.shape[-1]
    load_G = load_E.unflatten(-1, (groups, -1)).mean(dim=-1)
    return weighted_affinity(batch, spread_over_experts(load_G, num_experts), counted.tokens)


def communication_loss(batch: Routed, counted: Statistics, config: PreTrainedConfig) -> torch.Tensor:
    """sum_d f''_d P''_d, f''_d = D / (M T) times the tokens sent to group d (DeepSeek-V2, 2405.04434, eq. 29-31).

    M is topk_group. 1 at balance where every token reaches M groups, less where some reach fewer.
    """
    num_experts, groups = counted.counts_E.shape[-1], counted.sent_G.shape[-1]
    load_G = counted.sent_G * groups / (config.topk_group * counted.tokens.clamp_min(1.0).unsqueeze(-1))
    return weighted_affinity(batch, spread_over_experts(load_G, num_experts), counted.tokens)


def sequence_loss(batch: Routed, counted: Statistics, config: PreTrainedConfig) -> torch.Tensor:
    """The expert loss within each sequence, averaged over the sequences (DeepSeek-V3, 2412.19437, eq. 17-20).

    1 at balance within every sequence. A row of the batch is a sequence.
    """
    split = (batch.sequences, -1)
    mask_BS1 = batch.mask_T.unflatten(-1, split).unsqueeze(-1)
    load_BE = expert_load((batch.chosen_TE.unflatten(-2, split) * mask_BS1).sum(dim=-2))
    affinity_BE = (batch.affinity_TE.unflatten(-2, split) * mask_BS1).sum(dim=-2)
    P_BE = affinity_BE / mask_BS1.sum(dim=-2).clamp_min(1.0)
    return (load_BE * P_BE).sum(dim=(-1, -2)) / counted.sequences.clamp_min(1.0)


def z_loss(batch: Routed, counted: Statistics, config: PreTrainedConfig) -> torch.Tensor:
    """mean_t (logsumexp_j x_{j,t})^2 (ST-MoE, https://arxiv.org/abs/2202.08906, eq. 5)."""
    squared_T = batch.logits_TE.logsumexp(dim=-1).square()
    return (squared_T * batch.mask_T).sum(dim=-1) / counted.tokens.clamp_min(1.0)


# The coefficient of each loss in the configuration -> the loss.
LOSSES = {
    "router_aux_loss_coef": expert_loss,
    "device_aux_loss_coef": device_loss,
    "comm_aux_loss_coef": communication_loss,
    "seq_aux_loss_coef": sequence_loss,
    "router_z_loss_coef": z_loss,
}


PENALTY = "router_penalty"  # that of a router which has one (`Router.penalty`), weighted by its own state


# ---- REINFORCE ----


def policy_loss(
    batch: Routed, baseline_T: torch.Tensor, token_loss_T: torch.Tensor, mask_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The policy's loss and the baseline's, means over the tokens that have a loss (`mask_T`).

    REINFORCE with a learned baseline (Clark et al., https://arxiv.org/abs/2202.01169, 3.3): the gradient of the first
    is that of the expected token loss, (loss - baseline) grad log pi(chosen); the second is (baseline - loss)^2.
    """
    tokens = mask_T.sum().clamp_min(1.0)
    log_pi_T = (batch.logits_TE.log_softmax(dim=-1) * batch.chosen_TE).sum(dim=-1)
    advantage_T = (token_loss_T - baseline_T).detach()
    policy = (advantage_T * log_pi_T * mask_T).sum() / tokens
    baseline = ((baseline_T - token_loss_T.detach()).square() * mask_T).sum() / tokens
    return policy, baseline


# ---- bias ----


@torch.no_grad()
def update_selection_bias(bias_E: torch.Tensor, counts_E: torch.Tensor, speed: float) -> None:
    """b_i += speed * sign(mean load - load_i), in place: once per optimizer step, with the whole step's counts.

    Auxiliary-loss-free balancing (https://arxiv.org/abs/2408.15664, algorithm 1; DeepSeek-V3, 2.1.2).
    """
    counts_E = counts_E.to(bias_E)
    bias_E += speed * torch.sign(counts_E.mean() - counts_E)


@torch.no_grad()
def update_with_zero_mean(bias_E: torch.Tensor, counts_E: torch.Tensor, speed: float) -> None:
    """The same less the mean of the update over the experts, in place.

    A bias common to all moves no choice, and without this it drifts: torchtitan's rule
    (https://github.com/pytorch/torchtitan).
    """
    counts_E = counts_E.to(bias_E)
    update_E = speed * torch.sign(counts_E.mean() - counts_E)
    bias_E += update_E - update_E.mean()


@torch.no_grad()
def quantile_bias(scores_TE: torch.Tensor, bias_E: torch.Tensor, top_k: int, mask_T: torch.Tensor) -> torch.Tensor:
    """The bias [E] with which K T / E of these tokens would take each expert, at the prices of now.

    Quantile balancing (Jianlin Su, https://kexue.fm/archives/11619): one alternation of the dual of the assignment
    with the largest scores and equal loads. A token's price a_t is the largest s + b that it does not take; an
    expert's is the (1 - K / E) quantile of s_{i,t} - a_t, and b_i is minus that.
    """
    experts = scores_TE.shape[-1]
    price_T1 = (scores_TE + bias_E).topk(min(top_k + 1, experts), dim=-1).values[:, -1:]
    return -exceeded_by(scores_TE - price_T1, top_k / experts, mask_T)
