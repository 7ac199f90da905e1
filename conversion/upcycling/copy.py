"""copy: every expert is the dense feed-forward network (Sparse Upcycling, https://arxiv.org/abs/2212.05055, 3.1).

With weights that sum to 1, any choice of experts gives the dense output: the model starts where the dense one stands.
"""

import torch

from .strategy import take
from .whole import Whole


class Copy(Whole):
    held_matrices = 0

    def piece(self, index: int, part: str, neurons: slice) -> torch.Tensor:
        return take(part, self.layer.network[part], neurons)
