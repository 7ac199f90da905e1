"""Verdicts on what was measured, over seeds."""

import math
from collections.abc import Iterable
from typing import Any

HOLDS, DOES_NOT, UNDECIDED = "holds", "does not hold here", "undecided at this size"
EQUAL = 0.02  # of the largest
MARGIN = 0.01  # of a number: what counts as no difference, and as one with too few seeds to know their error

Runs = dict[str, list[dict[str, Any]]]  # arm -> what each seed measured


def mean(runs: list[dict[str, Any]], name: str) -> float:
    return sum(run[name] for run in runs) / len(runs)


def mean_losses(runs: list[dict[str, Any]]) -> list[float]:
    """The training loss of each step."""
    return [sum(step) / len(step) for step in zip(*(run["losses"] for run in runs), strict=True)]


def differ(sizes: Iterable[float]) -> bool:
    """Whether sizes of models are not the same, but for what cannot be made equal."""
    sizes = list(sizes)
    return max(sizes) - min(sizes) > EQUAL * max(sizes)


def spread(runs: list[dict[str, Any]], name: str) -> float:
    """Standard deviation over the seeds, 0 of one."""
    centre = mean(runs, name)
    return math.sqrt(sum((run[name] - centre) ** 2 for run in runs) / max(len(runs) - 1, 1))


def difference(runs: Runs, arm: str, other: str, name: str) -> tuple[float, float]:
    """Smallest and largest that the difference of two arms may be, seed by seed.

    Twice the standard error around the mean; with fewer than three seeds, whose error is unknown, those measured, and
    MARGIN more.
    """
    differences = [one[name] - two[name] for one, two in zip(runs[arm], runs[other], strict=True)]
    if len(differences) < 3:
        margin = MARGIN * abs(mean(runs[other], name))
        return min(differences) - margin, max(differences) + margin
    centre = sum(differences) / len(differences)
    error = spread([{name: x} for x in differences], name) / math.sqrt(len(differences))
    return centre - 2 * error, centre + 2 * error


def lower(runs: Runs, arm: str, other: str, name: str = "held_out_loss") -> str:
    """Whether `arm` is lower than `other`."""
    least, most = difference(runs, arm, other, name)
    return HOLDS if most < 0 else DOES_NOT if least > 0 else UNDECIDED


def as_good(runs: Runs, arm: str, other: str, name: str = "held_out_loss") -> str:
    """Whether `arm` is at most MARGIN above `other`."""
    least, most = difference(runs, arm, other, name)
    margin = MARGIN * abs(mean(runs[other], name)) * (2 if len(runs[arm]) < 3 else 1)
    return HOLDS if most <= margin else DOES_NOT if least > margin else UNDECIDED


def both(*verdicts: str) -> str:
    """Of several that have to hold together."""
    if all(x == HOLDS for x in verdicts):
        return HOLDS
    return DOES_NOT if DOES_NOT in verdicts else UNDECIDED
