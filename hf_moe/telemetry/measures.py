"""What the counts of a router say: the numbers of the report.

Shapes: E experts, K experts per token, N domains, V followed token ids.
"""

import math

import torch

from ..model.balancing import expert_load
from .counts import RouterCounts, entropy


def load(counts_E: torch.Tensor) -> torch.Tensor:
    """Each expert's share of the choices beside the fair one, 1 / E (DeepSeekMoE's f_i): 1 at balance."""
    return expert_load(counts_E.double())


def relative_entropy(nats: float, experts: int) -> float:
    """Entropy divided by that of E equal shares, log E: 0 for one expert, 1 for all alike."""
    return nats / math.log(experts) if experts > 1 else 1.0


def load_entropy(counts_E: torch.Tensor) -> float:
    """Entropy of the experts' shares of the choices, divided by log E."""
    shares = counts_E.double() / counts_E.sum().clamp_min(1)
    return relative_entropy(entropy(shares).item(), len(counts_E))


def coactivation(together_EE: torch.Tensor) -> torch.Tensor:
    """N_ij / N_i, the share of expert i's tokens that expert j gets, too (OLMoE, arXiv 2409.02060, section 5).

    0 if i is dead. The diagonal is 0.
    """
    together_EE = together_EE.double()
    shares = together_EE / together_EE.diagonal().clamp_min(1).unsqueeze(-1)
    return shares.fill_diagonal_(0)


def domain_specialization(chosen_NE: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
    """N_{E_i, D} / N_D, the share of a domain's tokens for which expert i is chosen (OLMoE, section 5): [N, E].

    Chance is K / E with the K experts of a token, and 1 / E with the first alone.
    """
    return chosen_NE.double() / tokens_N.double().clamp_min(1).unsqueeze(-1)


def vocabulary_specialization(table_VE: torch.Tensor, rare: int) -> tuple[torch.Tensor, torch.Tensor]:
    """max_i N_{x, E_i} / N_x of each token id x that occurs `rare` times or more, and which expert i it is.

    The share of the id's occurrences that go first to its favourite expert (OLMoE, section 5, with k = 1). -1 and NaN
    for rarer ids.
    """
    counts_V = table_VE.sum(dim=-1)
    best_V, expert_V = (table_VE.double() / counts_V.clamp_min(1).unsqueeze(-1)).max(dim=-1)
    known_V = counts_V >= rare
    return best_V.masked_fill(~known_V, math.nan), expert_V.masked_fill(~known_V, -1)


def mean_of_known(values: torch.Tensor) -> float | None:
    """The mean of what is not NaN; None where nothing is left."""
    known = values[~values.isnan()]
    return known.mean().item() if len(known) else None


def router_numbers(counts: RouterCounts, rare: int) -> dict:
    """The numbers of one router, as they stand in the JSON."""
    chosen_E, experts = counts.chosen_NE.sum(dim=0).cpu(), counts.chosen_NE.shape[-1]
    first_E, tokens_N = counts.first_NE.sum(dim=0).cpu(), counts.tokens_N.cpu()
    specialized = {
        name: mean_of_known(vocabulary_specialization(table.cpu(), rare)[0])
        for name, table in (("read", counts.read_VE), ("predicted", counts.predicted_VE))
    }
    share_E = first_E.double() / first_E.sum().clamp_min(1)
    return {
        "experts": experts,
        "top_k": counts.top_k,
        "experts_per_token": {"mean": counts.mean_k, "spread": counts.spread_k},
        "tokens": chosen_E.tolist(),
        "load": load(chosen_E).tolist(),
        "first_choice": share_E.tolist(),
        "dead": (chosen_E == 0).nonzero().flatten().tolist(),
        "load_entropy": load_entropy(chosen_E),
        "routing_entropy": relative_entropy((counts.entropy_N.sum().cpu() / tokens_N.sum()).item(), experts),
        "coactivation": coactivation(counts.together_EE.cpu()).tolist(),
        "domain_specialization": domain_specialization(counts.chosen_NE.cpu(), tokens_N).tolist(),
        "domain_specialization_first": domain_specialization(counts.first_NE.cpu(), tokens_N).tolist(),
        # What a frequent id would reach if the layer did not look at it: the share of the favourite of all.
        "vocabulary_specialization": specialized | {"chance": share_E.max().item()},
    }


def favourite_tokens(table_VE: torch.Tensor, rare: int, most: int) -> list[list[tuple[int, float, int]]]:
    """For each expert the ids that go to it before all others: (place in the table, share, occurrences).

    The largest shares first, at most `most`.
    """
    best_V, expert_V = vocabulary_specialization(table_VE, rare)
    counts_V, found = table_VE.sum(dim=-1), []
    for expert in range(table_VE.shape[-1]):
        places = (expert_V == expert).nonzero().flatten().tolist()
        places.sort(key=lambda place: (-best_V[place].item(), -counts_V[place].item()))
        found.append([(place, best_V[place].item(), counts_V[place].item()) for place in places[:most]])
    return found
