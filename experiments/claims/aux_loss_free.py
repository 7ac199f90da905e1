"""A selection bias balances without the price of a balance loss.

Loss-free balancing (https://arxiv.org/abs/2408.15664), table 2; DeepSeek-V3 (https://arxiv.org/abs/2412.19437), 4.5.2.
"""

from ..experiment import BALANCED, BIAS, Arm, Budget, Experiment
from ..verdicts import Runs, both, lower

SIGMOID = {"router_type": "sigmoid_topk", "norm_topk_prob": True}


def arms(budget: Budget) -> dict[str, Arm]:
    return {
        "bias": Arm(SIGMOID | BIAS),
        "balance loss": Arm(SIGMOID | BALANCED),
        "neither": Arm(SIGMOID | {"router_aux_loss_coef": 0.0}),
    }


def judge(runs: Runs) -> str:
    evens_out = lower(runs, "bias", "neither", "max_violation")
    return both(evens_out, lower(runs, "bias", "balance loss"))


EXPERIMENT = Experiment(
    claim="A bias that is moved by the load balances as well as a loss does, and the model is better.",
    source="loss-free balancing, https://arxiv.org/abs/2408.15664, table 2",
    paper="lower perplexity than with the loss at 1B and 3B parameters, and a far smaller violation.",
    arms=arms,
    judge=judge,
    equal="training_flops",
)
