"""Assignments in which every expert gets its share of the tokens (BASE and S-BASE).

Shape suffixes: T tokens, E experts. Both return scores [T, E] whose largest entries are the assignment. Rows that
`mask_T` marks 0 (padding) take no expert's place.
"""

import torch


@torch.no_grad()
def sinkhorn(logits_TE: torch.Tensor, mask_T: torch.Tensor | None = None, iterations: int = 50) -> torch.Tensor:
    """Log of the transport plan exp(logits) scaled to row sums 1 and column sums T / E, by alternate normalisation.

    S-BASE (https://arxiv.org/abs/2202.01169, appendix B.2). The last normalisation is of the columns, so that each
    expert is offered exactly T / E tokens' worth.
    """
    plan_TE = logits_TE
    tokens = torch.tensor(float(len(plan_TE)), device=plan_TE.device)
    if mask_T is not None:
        plan_TE = plan_TE.masked_fill(~mask_T.bool().unsqueeze(-1), float("-inf"))
        tokens = mask_T.sum().float().clamp_min(1.0)
    share = torch.log(tokens / plan_TE.shape[-1])
    for _ in range(iterations):
        plan_TE = plan_TE - plan_TE.logsumexp(dim=-1, keepdim=True).nan_to_num(neginf=0.0)
        plan_TE = plan_TE - plan_TE.logsumexp(dim=0, keepdim=True).nan_to_num(neginf=0.0) + share
    return plan_TE if mask_T is None else torch.where(mask_T.bool().unsqueeze(-1), plan_TE, logits_TE)


@torch.no_grad()
def auction(logits_TE: torch.Tensor, mask_T: torch.Tensor | None = None, epsilon: float = 1e-3) -> torch.Tensor:
    """The assignment with the largest sum of logits in which experts get T / E tokens each, within one; as a one-hot.

    Bertsekas' auction, as in BASE (https://arxiv.org/abs/2103.16716, 3.1): each free token bids for its best expert
    what that is worth to it above its second; an expert keeps its highest bidders and raises its price. The sum is
    within T epsilon of the best one. Loops on the host, so it waits for the device.
    """
    assigned_TE = torch.zeros_like(logits_TE)
    rows = torch.arange(len(logits_TE), device=logits_TE.device) if mask_T is None else mask_T.nonzero().squeeze(-1)
    if len(rows) > 0:
        values_TE, experts = logits_TE[rows].double(), logits_TE.shape[-1]
        places_E = torch.full((experts,), len(rows) // experts, device=rows.device)
        places_E[: len(rows) % experts] += 1
        index_T = auction_rounds(values_TE, places_E, epsilon)
        assigned_TE[rows, index_T] = 1.0
    # A token that is padding takes its best expert: nothing else is decided for it.
    free_T = assigned_TE.sum(dim=-1) == 0
    best_TE = torch.zeros_like(logits_TE).scatter(-1, logits_TE.argmax(dim=-1, keepdim=True), 1.0)
    return torch.where(free_T.unsqueeze(-1), best_TE, assigned_TE)


def auction_rounds(values_TE: torch.Tensor, places_E: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Expert of each token, [T], with `places_E` tokens an expert: bids until no token is free."""
    tokens, experts = values_TE.shape
    price_E = values_TE.new_zeros(experts)
    owner_T = torch.full((tokens,), -1, device=values_TE.device)
    bid_T = values_TE.new_zeros(tokens)  # what a token pays for the expert it holds
    while (free_T := (owner_T < 0).nonzero().squeeze(-1)).numel() > 0:
        worth_FE = values_TE[free_T] - price_E
        best = worth_FE.topk(min(2, experts), dim=-1)
        wanted_F = best.indices[:, 0]
        margin_F = best.values[:, 0] - best.values[:, -1]
        owner_T[free_T] = wanted_F
        bid_T[free_T] = price_E[wanted_F] + margin_F + epsilon
        for expert in wanted_F.unique().tolist():
            holders = (owner_T == expert).nonzero().squeeze(-1)
            places = int(places_E[expert])
            if len(holders) >= places and places > 0:
                ranked = holders[bid_T[holders].argsort(descending=True, stable=True)]
                owner_T[ranked[places:]] = -1
                price_E[expert] = bid_T[ranked[places - 1]]
            elif places == 0:
                owner_T[holders] = -1
                price_E[expert] = float("inf")
    return owner_T
