"""The rate that all others train at, beside its neighbours: no claim of a paper, but what each of them stands on."""

from ..experiment import BALANCED, Arm, Budget, Experiment
from ..verdicts import DOES_NOT, HOLDS, Runs, difference, mean

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


def arms(budget: Budget) -> dict[str, Arm]:
    rates = [factor * budget.learning_rate for factor in FACTORS]
    return {f"{rate:g}": Arm(BALANCED, {"learning_rate": rate}) for rate in rates}


def judge(runs: Runs) -> str:
    """It holds where none of the others is clearly below the budget's rate."""
    budgets = list(runs)[FACTORS.index(1.0)]
    best = min(runs, key=lambda arm: mean(runs[arm], "held_out_loss"))
    _, most = difference(runs, best, budgets, "held_out_loss")
    return DOES_NOT if best != budgets and most < 0 else HOLDS


EXPERIMENT = Experiment(
    claim="No rate of a half, a quarter, twice or four times as much is better than the budget's.",
    source="for the lab itself; top-k routing with a balance loss",
    paper="papers choose a rate by such a sweep, and seldom show it.",
    arms=arms,
    judge=judge,
    equal="training_flops",
)
