"""noise: copies that differ by Gaussian noise, relative to the standard deviation of each tensor.

Equal experts get equal gradients wherever the router weighs them alike; a little noise sets them apart.
"""

import math
from functools import cached_property

import torch

from .strategy import Request, Sizes, chunks, mean_and_std, take
from .whole import Whole


class Noise(Whole):
    options = {"granularity": 1, "noise_scale": 0.05}
    held_matrices = 1
    exact = False

    @classmethod
    def sizes(cls, request: Request) -> Sizes:
        scale = request.options["noise_scale"]
        if not 0 < scale < math.inf:
            raise ValueError(f"noise_scale ({scale}) must be above 0 and finite; without it use copy.")
        return super().sizes(request)

    @cached_property
    def deviations(self) -> dict[str, float]:
        """The standard deviation of each tensor."""
        return {part: mean_and_std(tensor)[1] for part, tensor in self.layer.network.items()}

    def piece(self, index: int, part: str, neurons: slice) -> torch.Tensor:
        dense = take(part, self.layer.network[part], neurons)
        std = self.request.options["noise_scale"] * self.deviations[part]
        generator, noisy = self.layer.generator("noise", index, part, neurons.start), torch.empty_like(dense)
        for source, target in zip(chunks(dense), chunks(noisy), strict=True):
            target.copy_(source.float() + torch.empty(source.shape).normal_(std=std, generator=generator))
        return noisy
