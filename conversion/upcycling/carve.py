"""carve: shared and routed experts cut out of the dense network without training (CMoE, https://arxiv.org/abs/2502.04416).

The neurons that add most over all tokens become the shared experts; the others are grouped by the tokens on which they
work, and routed. Nothing is added and nothing lost, but a token meets only K of the E groups.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch

from .clusters import activity, balanced_clusters, busiest_first
from .split import Split
from .strategy import REQUIRED, Request, Sizes, take


class Carve(Split):
    options = {"calibration": REQUIRED, "shared": 1}

    @classmethod
    def sizes(cls, request: Request) -> Sizes:
        shared = request.options["shared"]
        if shared < 1:
            raise ValueError(f"shared ({shared}) must be at least 1; without shared experts it is split.")
        request.require_divisor(request.experts + shared, "experts + shared")
        return Sizes(
            num_experts=request.experts,
            num_experts_per_tok=request.top_k,
            moe_intermediate_size=request.width // (request.experts + shared),
            n_shared_experts=shared,
            exact=request.top_k == request.experts and request.exact_factor(request.top_k),
            needs_uniform_router=True,
        )

    @classmethod
    def router_init(cls, request: Request) -> str:
        return "zero" if request.top_k == request.experts else "centroids"

    @cached_property
    def groups(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The neurons of the shared experts together, and those of each routed one, [E, I / (E + S)]."""
        active = activity(self.layer)
        shared = self.request.options["shared"]
        count = self.request.width // (self.request.experts + shared) * shared
        order = busiest_first(active)
        always, others = order[:count].sort().values, order[count:].sort().values
        groups = balanced_clusters(active[:, others].T, self.request.experts, self.layer.generator("carve"))
        return always, others[groups]

    @property
    def neurons(self) -> torch.Tensor:
        return self.groups[1]

    def experts(self, parts: Sequence[str]) -> Iterator[torch.Tensor]:
        for index, piece in enumerate(super().experts(parts)):
            # The shared experts have the output's bias.
            yield torch.zeros_like(piece) if parts[index % len(parts)] == "down_proj.bias" else piece

    def shared(self, part: str) -> torch.Tensor:
        return take(part, self.layer.network[part], self.groups[0])
