"""Experts that choose their tokens.

Expert choice (https://arxiv.org/abs/2202.09368), figure 2: training converges in half the steps of top-2 token choice.
The choice sees the whole batch, which a model that writes cannot: held-out loss here is of the causal choice.
"""

import torch

from ..experiment import BALANCED, Arm, Budget, Experiment
from ..verdicts import Runs, lower


def arms(budget: Budget) -> dict[str, Arm]:
    return {
        "expert choice": Arm({"router_type": "expert_choice", "router_aux_loss_coef": 0.0}),
        "token choice": Arm(BALANCED | {"router_type": "softmax_topk"}),
    }


@torch.no_grad()
def as_trained(trial, model) -> dict[str, float]:
    """The held-out loss with the choice of training, in which a token's experts depend on all tokens of the batch."""
    if model.config.router_type != "expert_choice":
        return {}
    model.train()
    batches = trial.text.held_out.to(model.device).split(trial.budget.rows)
    losses = [model(x, labels=x, use_cache=False, output_router_logits=False).loss for x in batches]
    return {"loss_with_the_choice_of_training": torch.stack(losses).mean().item()}


def judge(runs: Runs) -> str:
    return lower(runs, "expert choice", "token choice")


EXPERIMENT = Experiment(
    claim="Experts that choose their tokens train a better model, generated from causally, too.",
    source="expert choice, https://arxiv.org/abs/2202.09368, figure 2",
    paper="training converges about twice as fast as top-2; nothing is said of generating token by token.",
    arms=arms,
    judge=judge,
    equal="training_flops",
    measure=as_trained,
)
