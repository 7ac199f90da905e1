"""Losses that keep the experts busy and the router calm: pure functions of one layer's routing.

Shape suffixes: T tokens, E routed experts, K experts per token. `mask_T` is 1 where a token counts and 0 on padding.
Each loss is per layer; the model averages over its sparse layers. (Pooling the layers before the product, as done
elsewhere, lets opposite imbalances cancel.)
"""

import torch


def expert_counts(index_TK: torch.Tensor, num_experts: int, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """How many tokens chose each expert, [E] in float32. Indices outside [0, E) are not counted."""
    chosen_TKE = index_TK.unsqueeze(-1) == torch.arange(num_experts, device=index_TK.device)
    chosen_TE = chosen_TKE.any(dim=-2).float()
    return (chosen_TE if mask_T is None else chosen_TE * mask_T.float().unsqueeze(-1)).sum(dim=0)


def masked_mean(values_T: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
    """Mean over the tokens that count (dimension 0); 0 where none does."""
    if mask_T is None:
        return values_T.mean(dim=0)
    mask_T = mask_T.float()
    weighted = values_T * mask_T.view(-1, *[1] * (values_T.dim() - 1))
    return weighted.sum(dim=0) / mask_T.sum().clamp_min(1.0)


def load_balancing_loss(
    affinity_TE: torch.Tensor, index_TK: torch.Tensor, mask_T: torch.Tensor | None = None
) -> torch.Tensor:
    """sum_i f_i P_i, with f_i = E / (K T) * count_i and P_i = mean_t s_{i,t} / sum_j s_{j,t}; scalar.

    Switch (https://arxiv.org/abs/2101.03961, eq. 4-6) at K = 1, DeepSeekMoE's expert loss
    (https://arxiv.org/abs/2401.06066, eq. 12-14) at any K. At perfect balance it is 1 whatever E and K are
    (Transformers' is K there), and E / K when every token goes to the same K experts with all its probability. Scores
    are normalised per token, which leaves a softmax as it is and makes sigmoids sum to 1 (DeepSeek-V3,
    https://arxiv.org/abs/2412.19437, eq. 18-20).
    """
    num_experts, top_k = affinity_TE.shape[-1], index_TK.shape[-1]
    tokens = index_TK.shape[0] if mask_T is None else mask_T.float().sum().clamp_min(1.0)
    f_E = expert_counts(index_TK, num_experts, mask_T) * num_experts / (top_k * tokens)
    affinity_TE = affinity_TE.float()
    P_E = masked_mean(affinity_TE / affinity_TE.sum(dim=-1, keepdim=True), mask_T)
    return (f_E * P_E).sum()


def router_z_loss(logits_TE: torch.Tensor, mask_T: torch.Tensor | None = None) -> torch.Tensor:
    """mean_t (logsumexp_j x_{j,t})^2 (ST-MoE, https://arxiv.org/abs/2202.08906, eq. 5); scalar."""
    return masked_mean(logits_TE.float().logsumexp(dim=-1).square(), mask_T)
