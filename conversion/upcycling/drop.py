"""drop: Drop-Upcycling (https://arxiv.org/abs/2502.19261, 3): copies with some neurons drawn anew, others an expert.

A share `drop_ratio` of the I neurons is chosen at random for each expert. Their weights in every projection are drawn
from a normal distribution with the mean and standard deviation of the weights that they replace.
"""

import torch

from .strategy import CHUNK, NEURON_AXIS, Request, Sizes, mean_and_std
from .whole import Whole


class Drop(Whole):
    options = {"granularity": 1, "drop_ratio": 0.5}
    exact = False

    @classmethod
    def sizes(cls, request: Request) -> Sizes:
        ratio = request.options["drop_ratio"]
        if not 0 < ratio <= 1:
            raise ValueError(f"drop_ratio ({ratio}) must be above 0 and at most 1; without a drop it is copy.")
        return super().sizes(request)

    def expert(self, index: int, part: str) -> torch.Tensor:
        dense, axis = self.layer.network[part], NEURON_AXIS[part]
        if axis is None:
            return dense
        count = max(1, round(self.request.options["drop_ratio"] * self.request.width))
        dropped = torch.randperm(self.request.width, generator=self.layer.generator("drop", index))[:count]
        anew = dense.clone()
        before, after = dense.movedim(axis, 0), anew.movedim(axis, 0)  # one row a neuron
        mean, std = mean_and_std(before[dropped])
        generator = self.layer.generator("drop", index, part)
        for neurons in dropped.split(max(1, CHUNK // before[0].numel())):
            drawn = torch.empty(len(neurons), *before.shape[1:]).normal_(mean, std, generator=generator)
            after[neurons] = drawn.to(dense.dtype)
        return anew
