"""Experts that are whole feed-forward networks, or such networks cut into fine-grained experts by virtual groups."""

from collections.abc import Iterator, Sequence

import torch

from .strategy import Request, Sizes, Strategy


class Whole(Strategy):
    """A strategy that makes E whole networks. With `granularity` G each becomes G experts of width I / G.

    The G pieces of a network share their router row, so the K G best experts are K whole networks: virtual groups
    (https://arxiv.org/abs/2410.07524, 4.2). Their weights, which sum to 1 over the K G, are G times too small; the
    down projection, which is linear, makes up for that, so any activation is exact. Scaling the other projections as
    the paper does is exact for a homogeneous activation alone.
    """

    options = {"granularity": 1}
    exact = True  # if the networks are the dense one

    @classmethod
    def sizes(cls, request: Request) -> Sizes:
        pieces = request.options["granularity"]
        if pieces < 1:
            raise ValueError(f"granularity ({pieces}) must be at least 1.")
        request.require_divisor(pieces, "granularity")
        return Sizes(
            num_experts=request.experts * pieces,
            num_experts_per_tok=request.top_k * pieces,
            moe_intermediate_size=request.width // pieces,
            exact=cls.exact and request.exact_factor(pieces),
            tied=pieces,
        )

    def piece(self, index: int, part: str, neurons: slice) -> torch.Tensor:
        """Some neurons of one part of a whole network; the strategy must not need the others in memory."""
        raise NotImplementedError

    def experts(self, parts: Sequence[str]) -> Iterator[torch.Tensor]:
        pieces = self.request.options["granularity"]
        width = self.request.width // pieces
        for index in range(self.request.experts):
            for first in range(0, self.request.width, width):
                for part in parts:
                    neurons = slice(first, first + width)
                    if pieces > 1 and part == "down_proj.weight":
                        yield self.piece(index, part, neurons) * pieces
                    else:
                        yield self.piece(index, part, neurons)
