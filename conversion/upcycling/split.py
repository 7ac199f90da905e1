"""split: the dense network cut into E experts, no parameter more (LLaMA-MoE, https://arxiv.org/abs/2406.16554, 3.1).

At random, or, with a calibration text, so that neurons that work on the same tokens come together. All experts
together are the dense network: with K = E and a router of zeros the output is equal.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch

from .clusters import activity, balanced_clusters
from .strategy import Request, Sizes, Strategy, take


class Split(Strategy):
    options = {"calibration": None}

    @classmethod
    def sizes(cls, request: Request) -> Sizes:
        request.require_divisor(request.experts, "experts")
        return Sizes(
            num_experts=request.experts,
            num_experts_per_tok=request.top_k,
            moe_intermediate_size=request.width // request.experts,
            exact=request.top_k == request.experts and request.exact_factor(request.top_k),
            needs_uniform_router=True,
        )

    @classmethod
    def router_init(cls, request: Request) -> str:
        if request.top_k == request.experts:
            return "zero"  # nothing to choose, and equal weights make the sum the dense output
        return "normal" if request.options["calibration"] is None else "centroids"

    @cached_property
    def neurons(self) -> torch.Tensor:
        """The neurons of each expert, [E, I / E]."""
        experts, generator = self.request.experts, self.layer.generator("split")
        if self.request.options["calibration"] is None:
            order = torch.randperm(self.request.width, generator=generator)
            return order.view(experts, -1).sort(dim=-1).values
        return balanced_clusters(activity(self.layer).T, experts, generator)

    def experts(self, parts: Sequence[str]) -> Iterator[torch.Tensor]:
        tensors = {part: self.layer.network[part] for part in parts}
        for neurons in self.neurons:
            for part, tensor in tensors.items():
                piece = take(part, tensor, neurons)
                # The K weights sum to 1: an expert adds what its neurons added.
                yield piece * self.request.top_k if part == "down_proj.weight" else piece

    @cached_property
    def affinity(self) -> torch.Tensor:
        active = activity(self.layer)
        return torch.stack([active[:, neurons].norm(dim=-1) for neurons in self.neurons], dim=-1)
