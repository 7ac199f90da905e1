"""The formulas of each schedule's bubble, beside PyTorch's order of actions acted out."""

import pytest

from hf_moe.sizes.pipeline import BUBBLES, bubble_share
from tests.pipelines import time_of_step

# F, I = B - W, W: all alike; of odd sizes; a long backward; not taken apart, as with activation checkpointing.
TIMES = [(1, 1, 1), (3, 5, 4), (1, 2, 0.5), (1, 3, 0)]


@pytest.mark.parametrize("times", TIMES, ids=str)
@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("name", BUBBLES)
def test_formula_is_what_the_processes_wait(name, processes, times):
    forward, inputs, weights = times
    work = 30 * sum(times)
    took = time_of_step(name, processes, 30, forward, inputs, weights)
    found = BUBBLES[name](processes, forward, inputs + weights, weights)
    if name == "dualpipev" and forward != inputs:  # the paper's formula is for these alike
        assert took - work <= found + 1e-9
        assert found - (took - work) <= (inputs - forward) * (processes - 1) / 2 + inputs / 2
    else:
        assert found == pytest.approx(took - work)
    assert bubble_share(name, processes, 30, forward, inputs + weights, weights) == pytest.approx(
        found / (found + work)
    )


def test_in_the_order_of_the_paper():
    """With F = I = W, and with fewer of them, the further down, the less is waited."""
    shares = [bubble_share(name, 4, 12, 1, 2, 1) for name in ("1f1b", "interleaved", "dualpipev", "zbv")]
    assert shares == sorted(shares, reverse=True) and shares[0] == 9 / 45 and shares[-1] == 1.5 / 37.5
