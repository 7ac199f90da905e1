"""The FP8 kernels, compiled for a Hopper card without one: what Triton's interpreter does not refuse.

Prints the kernels, and the bytes of shared memory that a program of each takes.
"""

import torch

from hf_moe.kernels.formula import Formula
from hf_moe.kernels.fp8 import operators, quantise

from ..compile_worker import report

FORMULAS = {"gated": Formula("silu"), "plain": Formula("relu2", gated=False)}


def layers() -> None:
    """Launch the kernels of experts and of a linear layer, forward and backward, on numbers that don't matter."""
    torch.Tensor.new_empty = torch.Tensor.new_zeros  # indices, too, which no kernel writes here
    index, weights = torch.zeros(256, 2, dtype=torch.long), torch.rand(256, 2, requires_grad=True)
    x = torch.zeros(256, 256, dtype=torch.bfloat16, requires_grad=True)
    for formula in FORMULAS.values():
        up = torch.zeros(4, 256 if formula.gated else 128, 256, requires_grad=True)
        down = torch.zeros(4, 256, 128, requires_grad=True)
        width = up.shape[1]
        low, widen, narrow = (
            torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)
            for shape in ((256, 4, 3), (4, width, 3), (4, 3, 128))
        )
        for factors in ((None, None, None), (low, widen, narrow)):
            output, narrowed = operators.experts(x, index, weights, up, down, *factors, formula)
            (output.sum() + (0 if narrowed is None else narrowed.sum())).backward()
    for rows, columns in ((256, 256), (48, 144)):
        weight = torch.zeros(columns, 256, dtype=torch.bfloat16, requires_grad=True)
        operators.linear(x[:rows], weight).sum().backward()
        quantise.blocks_of(weight.detach().unsqueeze(0))


if __name__ == "__main__":
    report(layers)
