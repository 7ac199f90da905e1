"""Experts of few tokens whose weights are stored as [E, in, out], against expert by expert in float64."""

import pytest
import torch

pytest.importorskip("triton")

from hf_moe.kernels.decode import experts, turned_network
from hf_moe.kernels.formula import Formula

from . import reference
from .steps import DEVICE

FORMULAS = {
    "in turns, limit and shift": Formula("quick_gelu", True, True, True, 3.0, 1.0),
    "gate first": Formula("silu", True, True),
    "plain": Formula("relu2", False, True),
}


@pytest.mark.parametrize("biased", [True, False], ids=["biases", ""])
@pytest.mark.parametrize("tokens", [1, 5, 33])
@pytest.mark.parametrize("name", FORMULAS)
def test_experts_that_are_stored_turned(name, tokens, biased):
    torch.manual_seed(0)
    formula, count, size, inner, top_k = FORMULAS[name], 5, 38, 70, 3
    width = 2 * inner if formula.gated else inner
    x, weights = torch.randn(tokens, size), torch.rand(tokens, top_k)
    index = torch.rand(tokens, count + 1).argsort(-1)[:, :top_k].contiguous()  # the last one is none
    up, down = torch.randn(count, size, width) * size**-0.5, torch.randn(count, inner, size) * inner**-0.5
    biases = (torch.randn(count, width), torch.randn(count, size)) if biased else (None, None)
    given = [y if y is None else y.double() for y in (x, index, weights, up, down, *biases)]
    given[1] = index
    expected = reference.experts(*given, None, None, None, *formula)

    matrices, of_columns = (y.to(DEVICE) for y in (up, down)), None
    if biased:
        of_columns = tuple(y.to(DEVICE) for y in biases)
    network = turned_network(*matrices, formula.gated, formula.interleaved, of_columns)
    on_device = (y.to(DEVICE) for y in (x, weights, index))
    actual = experts.mixture(*on_device, network, None, formula).cpu().double()
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
