"""shared: shared experts, which every token meets, beside routed ones (DeepSeekMoE, https://arxiv.org/abs/2401.06066).

Added: S whole networks beside E routed ones; all are the dense network with 1 / (S + 1) of its down projection.
Carved: the dense network is cut into G pieces. S of them are shared; the other G - S exist E times, routed together as
virtual groups. Either way a token's experts sum to the dense network.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch

from .clusters import activity, busiest_first
from .strategy import Request, Sizes, Strategy, take


class Shared(Strategy):
    options = {"shared": 1, "granularity": 1, "carved": False, "calibration": None}

    @classmethod
    def sizes(cls, request: Request) -> Sizes:
        shared, pieces, carved = (request.options[name] for name in ("shared", "granularity", "carved"))
        if shared < 1 or pieces < 1:
            raise ValueError(f"shared ({shared}) and granularity ({pieces}) must be at least 1.")
        if carved and shared >= pieces:
            raise ValueError(
                f"carved: shared ({shared}) must be below granularity ({pieces}), the pieces that the network has."
            )
        if not carved and request.options["calibration"] is not None:
            raise ValueError("strategy 'shared' reads calibration to choose the neurons to carve: say carved, too.")
        request.require_divisor(pieces, "granularity")
        routed = pieces - shared if carved else pieces
        return Sizes(
            num_experts=request.experts * routed,
            num_experts_per_tok=request.top_k * routed,
            moe_intermediate_size=request.width // pieces,
            n_shared_experts=shared,
            shared_expert_intermediate_size=request.width // pieces if carved else request.width,
            tied=routed,
            exact=request.exact_factor(routed if carved else routed * (shared + 1)),
        )

    @cached_property
    def neurons(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The neurons of the shared experts, and those of the routed ones."""
        everything, options = torch.arange(self.request.width), self.request.options
        if not options["carved"]:
            return everything.repeat(options["shared"]), everything
        count = self.request.width // options["granularity"] * options["shared"]
        order = everything if options["calibration"] is None else busiest_first(activity(self.layer))
        return order[:count].sort().values, order[count:].sort().values

    @property
    def parts_of_the_sum(self) -> int:
        """Among how many the dense network is shared out: the added networks and the routed one."""
        return 1 if self.request.options["carved"] else self.request.options["shared"] + 1

    def experts(self, parts: Sequence[str]) -> Iterator[torch.Tensor]:
        tied = self.sizes(self.request).tied
        groups = self.neurons[1].view(tied, -1)
        for _ in range(self.request.experts):
            for neurons in groups:
                for part in parts:
                    piece = take(part, self.layer.network[part], neurons)
                    if part == "down_proj.weight":
                        piece = piece * (tied / self.parts_of_the_sum)
                    elif part == "down_proj.bias":  # the shared experts have it
                        piece = torch.zeros_like(piece)
                    yield piece

    def shared(self, part: str) -> torch.Tensor:
        piece = take(part, self.layer.network[part], self.neurons[0])
        return piece / self.parts_of_the_sum if part == "down_proj.weight" else piece
