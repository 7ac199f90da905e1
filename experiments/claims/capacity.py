"""A limit to how many tokens an expert takes.

Switch (https://arxiv.org/abs/2101.03961), 2.2 and table 1: tokens over the capacity are dropped, 1 to 1.25 costs
little. MegaBlocks (https://arxiv.org/abs/2211.15841), figure 2: the less is dropped the lower the loss. With a limit a
token's output depends on what stands beside it in the batch, when the model is used, too, if the limit holds there.
"""

import torch

from ..experiment import BALANCED, Arm, Budget, Experiment
from ..verdicts import Runs, lower

FACTORS = {"factor 1": 1.0, "factor 1.25": 1.25}
NEIGHBOURS = 16  # rows that stand beside a row


def arms(budget: Budget) -> dict[str, Arm]:
    limited = {
        name: Arm(BALANCED | {"expert_capacity_factor": x, "router_args": {"eval_capacity_factor": x}})
        for name, x in FACTORS.items()
    }
    return {"no limit": Arm(BALANCED)} | limited


@torch.no_grad()
def moved_by_neighbours(trial, model) -> dict[str, float]:
    """The largest change of a row's log-probabilities by other rows behind and before it in the batch."""
    model.eval()
    rows = trial.text.held_out[: NEIGHBOURS + 1].to(model.device)
    alone, beside = (model(x, use_cache=False).logits[-1].float().log_softmax(-1) for x in (rows[-1:], rows))
    return {"moved_by_neighbours": (alone - beside).abs().max().item()}


def judge(runs: Runs) -> str:
    return lower(runs, "no limit", "factor 1")


EXPERIMENT = Experiment(
    claim="Dropping tokens over an expert's capacity costs loss, and makes a token's output depend on its batch.",
    source="MegaBlocks, https://arxiv.org/abs/2211.15841, figure 2; Switch, https://arxiv.org/abs/2101.03961, table 1",
    paper="Switch drops at 1 to 1.25 at little cost; MegaBlocks drops none, and has the lowest loss.",
    arms=arms,
    judge=judge,
    equal="training_flops",
    measure=moved_by_neighbours,
)
