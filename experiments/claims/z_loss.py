"""A penalty on large router logits, and the precision that the router computes in.

ST-MoE (https://arxiv.org/abs/2202.08906), 3.1 and 3.3, and OLMoE (https://arxiv.org/abs/2409.02060), figure 11: fewer
spikes, quality no worse. hf_moe's routers compute in float32; here two arms have routers in bfloat16, in which large
logits round the most.
"""

import statistics
from types import MethodType

import torch

from ..experiment import BALANCED, Arm, Budget, Experiment
from ..verdicts import Runs, as_good, both, lower

Z_LOSS = BALANCED | {"router_z_loss_coef": 1e-3}
WINDOW, FAR = 20, 4  # steps before a step, and how many of their standard deviations above their mean a spike is


def arms(budget: Budget) -> dict[str, Arm]:
    return {
        "z-loss": Arm(Z_LOSS),
        "without": Arm(BALANCED),
        "z-loss, bfloat16 router": Arm(Z_LOSS, begin=router_in_bfloat16),
        "without, bfloat16 router": Arm(BALANCED, begin=router_in_bfloat16),
    }


def router_in_bfloat16(trial):
    from hf_moe.model.router import HfMoeRouter

    from ..trial import Start

    model = trial.model()
    for module in model.modules():
        if isinstance(module, HfMoeRouter):
            module.logits = MethodType(rounded_logits, module)
    return Start(model, trial.text)


def rounded_logits(router, state) -> torch.Tensor:
    """What a router without float32 would compute: the product of bfloat16 numbers, rounded to bfloat16."""
    return torch.nn.functional.linear(state.hidden_TD.bfloat16(), router.weight.bfloat16()).float()


def spikes(losses: list[float]) -> int:
    """Steps whose training loss is far above those before."""
    windows = ((losses[i - WINDOW : i], losses[i]) for i in range(WINDOW, len(losses)))
    return sum(now > statistics.mean(before) + FAR * statistics.stdev(before) for before, now in windows)


def says(runs: Runs) -> list[str]:
    counted = {arm: sum(spikes(run["losses"]) for run in found) for arm, found in runs.items()}
    return ["Spikes of the training loss: " + ", ".join(f"{arm} {count}" for arm, count in counted.items()) + "."]


def judge(runs: Runs) -> str:
    return both(lower(runs, "z-loss", "without", "router_logits"), as_good(runs, "z-loss", "without"))


EXPERIMENT = Experiment(
    claim="A z-loss keeps the router's logits small, at no price.",
    source="ST-MoE, https://arxiv.org/abs/2202.08906, 3.1; OLMoE, figure 11",
    paper="fewer spikes of the training loss, and quality no worse; routers compute in float32.",
    arms=arms,
    judge=judge,
    equal="training_flops",
    says=says,
)
