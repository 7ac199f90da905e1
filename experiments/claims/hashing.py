"""Experts help even where nothing is learnt of who gets what.

Hash Layers (https://arxiv.org/abs/2106.04426), table 1: a fixed hash of the token's id beats the dense model, and
Switch's learned routing at K = 1.
"""

from ..experiment import BALANCED, Arm, Budget, Experiment
from ..verdicts import Runs, lower


def arms(budget: Budget) -> dict[str, Arm]:
    one = {"num_experts_per_tok": 1}
    return {
        "hash": Arm(one | {"router_type": "hash", "router_aux_loss_coef": 0.0}),
        "learned": Arm(one | BALANCED | {"router_type": "softmax_topk"}),
        "dense": Arm(budget.dense | {"intermediate_size": budget.fields["moe_intermediate_size"]}),
    }


def judge(runs: Runs) -> str:
    return lower(runs, "hash", "dense")


EXPERIMENT = Experiment(
    claim="Routing by a hash of the token is better than the dense model of the same FLOPs.",
    source="Hash Layers, https://arxiv.org/abs/2106.04426, table 1",
    paper="lower perplexity than the dense model, and than Switch's learned routing.",
    arms=arms,
    judge=judge,
    equal="training_flops",
)
