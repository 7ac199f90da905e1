"""Experts that are near each other, made one: neurons matched, then weights and router rows averaged by what each is
worth.

After M-SMoE (https://arxiv.org/abs/2310.01334): the experts that are worth most stay, every other one joins the one
whose router logits are most like its own. There neurons are matched and weights averaged by frequency, and the
router keeps the leading expert's row; here what an expert is worth weighs, and rows are averaged alike.

Shapes: E routed experts, D hidden size, I neurons of an expert.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from .model import Expert, Mixture
from .scores import Seen


@dataclass(frozen=True)
class Merged:
    """Several experts of one layer as one. The first leads: the others' neurons take the places of its nearest."""

    mixture: Mixture
    layer: str
    experts: tuple[int, ...]
    shares: tuple[float, ...]  # which sum to 1

    def tensor(self, name: str) -> torch.Tensor:
        """What the expert has of the tensor `name`, in its type."""
        total = None
        for number, (expert, share) in enumerate(zip(self.experts, self.shares, strict=True)):
            part = self.mixture.expert(name, expert).float()
            if ".experts." in name and number:
                part = in_places(part, name, self.places[number - 1])
            total = share * part if total is None else total + share * part
        return total.to(self.mixture.outputs[name].dtype)

    @cached_property
    def places(self) -> list[torch.Tensor]:
        """For each expert but the first which of its neurons comes to each place: [I]."""
        lead = self.neurons(self.experts[0])
        return [matched(lead, self.neurons(expert)) for expert in self.experts[1:]]

    def neurons(self, expert: int) -> torch.Tensor:
        """What belongs to each neuron, one after the other: [I, .] float32."""
        parts = []
        for name in self.mixture.outputs:
            if name.startswith(f"{self.layer}.") and ".experts." in name:
                part, end = self.mixture.expert(name, expert).float(), name.rpartition(".")[2]
                if end == "down_proj":
                    parts.append(part.T)
                elif end.startswith("gate_up_proj"):
                    parts += [x.reshape(len(x), -1) for x in part.chunk(2)]
                elif end.startswith("up_proj"):
                    parts.append(part.reshape(len(part), -1))
        return torch.cat(parts, dim=1)


def in_places(part: torch.Tensor, name: str, places_I: torch.Tensor) -> torch.Tensor:
    """An expert's tensor with its neurons in these places."""
    end = name.rpartition(".")[2]
    if end == "down_proj":
        return part[:, places_I]
    if end.startswith("gate_up_proj"):
        return torch.cat([x[places_I] for x in part.chunk(2)])
    return part if end == "down_proj_bias" else part[places_I]


def matched(lead_IF: torch.Tensor, other_IF: torch.Tensor) -> torch.Tensor:
    """The order of the other's neurons in which the inner products with the lead's add up to most: [I].

    Git Re-Basin (https://arxiv.org/abs/2209.04836, 3.2). Raises ImportError where SciPy is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("Merging experts needs SciPy: pip install 'hf_moe[merge]'") from error
    _, places = linear_sum_assignment((lead_IF @ other_IF.T).numpy(), maximize=True)
    return torch.from_numpy(places)


def clusters(seen: Seen, score_E: torch.Tensor, kept: list[int], groups: int) -> list[list[int]]:
    """The experts that become one, each led by one of `kept`; within groups, where experts stand in some."""
    size = len(score_E) // groups
    norm_E = seen.alike.diagonal().sqrt().clamp_min(1e-30)
    cosine_EE = seen.alike / norm_E / norm_E.unsqueeze(-1)
    members = {expert: [expert] for expert in kept}
    for expert in range(len(score_E)):
        if expert not in members:
            near = [lead for lead in kept if lead // size == expert // size]
            members[max(near, key=lambda lead: cosine_EE[expert, lead].item())].append(expert)
    return [members[expert] for expert in kept]


def merged(
    mixture: Mixture, layer: str, seen: Seen, score_E: torch.Tensor, kept: list[int]
) -> list["Expert | Merged"]:
    """What stands in the place of each of `kept`."""
    found = []
    for members in clusters(seen, score_E, kept, mixture.config.n_group):
        worth = score_E[members]
        shares = worth / worth.sum() if worth.sum() > 0 else torch.full_like(worth, 1 / len(worth))
        alone = len(members) == 1
        found.append(
            Expert(mixture, members[0]) if alone else Merged(mixture, layer, tuple(members), tuple(shares.tolist()))
        )
    return found
