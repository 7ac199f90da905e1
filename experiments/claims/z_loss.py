"""A penalty on large router logits.

ST-MoE (https://arxiv.org/abs/2202.08906), 3.1, and OLMoE (https://arxiv.org/abs/2409.02060), figure 11: fewer spikes,
quality no worse.
"""

from ..experiment import BALANCED, Arm, Budget, Experiment
from ..verdicts import Runs, lower


def arms(budget: Budget) -> dict[str, Arm]:
    return {"z-loss": Arm(BALANCED | {"router_z_loss_coef": 1e-3}), "without": Arm(BALANCED)}


def judge(runs: Runs) -> str:
    return lower(runs, "z-loss", "without", "router_logits")


EXPERIMENT = Experiment(
    claim="A z-loss keeps the router's logits small, at no price.",
    source="ST-MoE, https://arxiv.org/abs/2202.08906, 3.1; OLMoE, figure 11",
    paper="fewer spikes of the training loss, and quality no worse.",
    arms=arms,
    judge=judge,
    equal="training_flops",
)
