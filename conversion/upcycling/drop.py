"""drop: Drop-Upcycling (https://arxiv.org/abs/2502.19261, 3): copies with some neurons drawn anew, others an expert.

A share `drop_ratio` of the I neurons is chosen at random for each expert. Their weights in every projection are drawn
from a normal distribution with the mean and standard deviation of the weights that they replace.
"""

from functools import cached_property

import torch

from .strategy import CHUNK, NEURON_AXIS, Request, Sizes, mean_and_std, take
from .whole import Whole


class Drop(Whole):
    options = {"granularity": 1, "drop_ratio": 0.5}
    held_matrices = 1
    exact = False

    @classmethod
    def sizes(cls, request: Request) -> Sizes:
        ratio = request.options["drop_ratio"]
        if not 0 < ratio <= 1:
            raise ValueError(f"drop_ratio ({ratio}) must be above 0 and at most 1; without a drop it is copy.")
        return super().sizes(request)

    @cached_property
    def statistics(self) -> dict[tuple[int, str], tuple[float, float]]:
        """Mean and standard deviation of what an expert's part loses, once they are known: all its pieces use them."""
        return {}

    def dropped(self, index: int) -> torch.Tensor:
        """The neurons of a network that are drawn anew, in order."""
        count = max(1, round(self.request.options["drop_ratio"] * self.request.width))
        return torch.randperm(self.request.width, generator=self.layer.generator("drop", index))[:count].sort().values

    def piece(self, index: int, part: str, neurons: slice) -> torch.Tensor:
        dense, axis = self.layer.network[part], NEURON_AXIS[part]
        if axis is None:
            return dense
        dropped, before = self.dropped(index), dense.movedim(axis, 0)  # one row a neuron
        if (index, part) not in self.statistics:
            self.statistics[index, part] = mean_and_std(before, dropped)
        mean, std = self.statistics[index, part]
        anew = take(part, dense, neurons).clone()
        after, generator = anew.movedim(axis, 0), self.layer.generator("drop", index, part, neurons.start)
        here = dropped[(dropped >= neurons.start) & (dropped < neurons.stop)] - neurons.start
        for some in here.split(max(1, CHUNK // before[0].numel())):
            drawn = torch.empty(len(some), *before.shape[1:]).normal_(mean, std, generator=generator)
            after[some] = drawn.to(dense.dtype)
        return anew
