"""Weights on a CPU where its kernels are the same in each run."""

import torch
from torch import nn

BYTES = 64  # where PyTorch's own tensors begin


@torch.no_grad()
def align(model: nn.Module) -> None:
    """Move the weights of `model` that are on the CPU to multiples of 64 bytes, where new ones are.

    Loaded ones lie as in their file, whose header has any length. MKL sums in another order for each alignment, and a
    resumed run would differ in the last bit from one that drew its weights, or a policy from the copy it began as.
    """
    for weight in (*model.parameters(), *model.buffers()):
        if weight.device.type == "cpu" and weight.data_ptr() % BYTES:
            weight.data = weight.data.clone()
