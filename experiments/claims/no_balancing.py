"""Without a balance loss experts die.

OLMoE (https://arxiv.org/abs/2409.02060), figures 9 and 10: without the loss one expert soon gets most of a layer's
tokens and several get none, and the training loss is higher.
"""

from ..experiment import BALANCED, Arm, Budget, Experiment
from ..verdicts import Runs, both, lower


def arms(budget: Budget) -> dict[str, Arm]:
    return {"balanced": Arm(BALANCED), "not balanced": Arm({"router_aux_loss_coef": 0.0})}


def judge(runs: Runs) -> str:
    """Both parts of the claim: the load is more even, and the loss is lower."""
    uneven = lower(runs, "balanced", "not balanced", "max_violation")
    return both(uneven, lower(runs, "balanced", "not balanced"))


EXPERIMENT = Experiment(
    claim="Without a balance loss the load collapses onto few experts, and the model is worse.",
    source="OLMoE, https://arxiv.org/abs/2409.02060, figures 9 and 10",
    paper="without it one expert soon takes most of a layer's tokens, several take none, and the loss is higher.",
    arms=arms,
    judge=judge,
    equal="training_flops",
    experts=True,
)
