"""What routers did, summed over tokens: the memory it takes does not grow with their number.

Shapes: T tokens that are not padding, E experts, K experts per token, N domains, V token ids that are followed.
"""

import math

import torch
from accelerate import Accelerator
from torch import nn

from ..model.assignment import Assignment, in_slots
from ..routers import Router, Routing

RARE = 10  # an id that occurs less often says nothing of where it goes (OLMoE's threshold, too)
SUMS = ("tokens_N", "tokens_K", "chosen_NE", "first_NE", "together_EE", "entropy_N", "read_VE", "predicted_VE")
FOLLOWED = 4096  # most frequent token ids whose experts are counted


class RouterCounts:
    """The sums of one router over all tokens so far."""

    def __init__(self, experts: int, domains: int, followed: int, device: torch.device):
        def zeros(*shape, dtype=torch.long):
            return torch.zeros(shape, dtype=dtype, device=device)

        self.top_k = 0
        self.tokens_N = zeros(domains)
        self.tokens_K = zeros(experts + 1)  # tokens that have 0, 1, 2 and so on experts
        self.chosen_NE = zeros(domains, experts)  # tokens for which an expert is among the K
        self.first_NE = zeros(domains, experts)  # tokens for which it is the first
        self.together_EE = zeros(experts, experts)  # tokens that two experts share
        self.entropy_N = zeros(domains, dtype=torch.float32 if device.type == "mps" else torch.float64)
        self.read_VE = zeros(followed, experts)  # times that a token went first to an expert
        self.predicted_VE = zeros(followed, experts)  # the same of the token that the model would write next

    def add(
        self,
        routing: Routing,
        router: Router,
        domain: int,
        kept_T: torch.Tensor,
        read_T: torch.Tensor,
        predicted_T: torch.Tensor,
    ) -> None:
        """One batch. kept_T: the rows that are not padding; read_T, predicted_T: which followed id each is, or -1."""
        if routing.token_S is not None:
            rows = Assignment(routing.weights_SK, routing.index_SK, routing.token_S)
            weights_TE, index_TE, _ = in_slots(rows, *routing.logits_TE.shape)
            routing = routing._replace(weights_SK=weights_TE, index_SK=index_TE, token_S=None)
        logits_TE, index_TK = routing.logits_TE[kept_T].float(), routing.index_SK[kept_T]
        first_T, experts = first_choice(routing)[kept_T], routing.experts
        self.top_k = index_TK.shape[-1]
        self.tokens_N[domain] += len(index_TK)
        chosen_TE = nn.functional.pad(torch.zeros_like(logits_TE), (0, 1))  # the last: an empty slot
        chosen_TE = chosen_TE.scatter_(-1, index_TK, 1.0)[:, :experts]
        self.tokens_K += torch.bincount(chosen_TE.sum(dim=-1).long(), minlength=experts + 1)
        self.chosen_NE[domain] += chosen_TE.sum(dim=0).long()
        self.first_NE[domain] += torch.bincount(first_T, minlength=experts)[:experts]
        self.together_EE += (chosen_TE.T @ chosen_TE).long()
        self.entropy_N[domain] += entropy(probabilities(logits_TE, router, experts)).sum()
        for table_VE, row_T in ((self.read_VE, read_T), (self.predicted_VE, predicted_T)):
            cell = (row_T * experts + first_T)[(row_T >= 0) & (first_T < experts)]
            table_VE.view(-1).index_add_(0, cell, torch.ones_like(cell))

    @property
    def mean_k(self) -> float:
        """The mean number of experts of a token."""
        number_K = torch.arange(len(self.tokens_K), device=self.tokens_K.device)
        return (self.tokens_K * number_K).sum().item() / self.total

    @property
    def spread_k(self) -> float:
        """Its standard deviation over the tokens."""
        number_K = torch.arange(len(self.tokens_K), device=self.tokens_K.device) - self.mean_k
        return math.sqrt((self.tokens_K * number_K.square()).sum().item() / self.total)

    @property
    def total(self) -> int:
        return max(self.tokens_K.sum().item(), 1)

    def reduce(self, accelerator: Accelerator) -> None:
        """Add up the sums of all processes."""
        for name in SUMS:
            setattr(self, name, accelerator.reduce(getattr(self, name), reduction="sum"))


def first_choice(routing: Routing) -> torch.Tensor:
    """The expert with the largest weight of each token, [T]; routers need not sort theirs. E or more: it has none."""
    best = routing.weights_SK.argmax(dim=-1, keepdim=True)
    return routing.index_SK.gather(-1, best).squeeze(-1)


def probabilities(logits_TE: torch.Tensor, router: Router, experts: int) -> torch.Tensor:
    """The router's scores of its experts, which sum to 1 for each token."""
    scores_TE = router.affinity(logits_TE)[:, :experts]
    return scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def entropy(probability: torch.Tensor) -> torch.Tensor:
    """-sum p log p over the last dimension, in nats."""
    return torch.special.entr(probability).sum(dim=-1)


def followed_ids(counts_V: torch.Tensor) -> torch.Tensor:
    """The most frequent token ids, at most FOLLOWED, none rarer than RARE: [V] in order of frequency."""
    counts, ids = counts_V.sort(descending=True, stable=True)
    return ids[:FOLLOWED][counts[:FOLLOWED] >= RARE]
