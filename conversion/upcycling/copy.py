"""copy: every expert is the dense feed-forward network (Sparse Upcycling, https://arxiv.org/abs/2212.05055, 3.1).

With weights that sum to 1, any choice of experts gives the dense output: the model starts where the dense one stands.
"""

from collections.abc import Iterator, Mapping

import torch


def copy(
    ffn: Mapping[str, torch.Tensor], num_experts: int, generator: torch.Generator
) -> Iterator[Mapping[str, torch.Tensor]]:
    for _ in range(num_experts):
        yield ffn
