"""More experts at the same FLOPs.

Switch (https://arxiv.org/abs/2101.03961), figure 1: with each token going to one expert, the loss falls as the number
of experts doubles.
"""

from ..experiment import BALANCED, Arm, Budget, Experiment
from ..verdicts import Runs, lower


def arms(budget: Budget) -> dict[str, Arm]:
    counts = [budget.fields["num_experts"] * x // 4 for x in (1, 2, 4, 8)]
    fields = BALANCED | {"num_experts_per_tok": 1}
    return {f"{count} experts": Arm(fields | {"num_experts": count}) for count in counts}


def judge(runs: Runs) -> str:
    first, *_, last = runs
    return lower(runs, last, first)


EXPERIMENT = Experiment(
    claim="At equal FLOPs of a token's experts, more experts lower the loss.",
    source="Switch Transformers, https://arxiv.org/abs/2101.03961, figure 1",
    paper="the test loss falls with each doubling of the experts, at the FLOPs of one.",
    arms=arms,
    judge=judge,
    equal=None,  # but for the router, which grows with the experts
)
