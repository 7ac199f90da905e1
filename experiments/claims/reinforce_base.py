"""Three ways to learn where a token goes, beside top-k: by the policy's gradient, and by two balanced assignments.

Clark et al. (https://arxiv.org/abs/2202.01169): S-BASE scales best, REINFORCE is competitive and
better than hashing. BASE: https://arxiv.org/abs/2103.16716. One expert a token.
"""

from ..experiment import BALANCED, Arm, Budget, Experiment
from ..verdicts import Runs, lower


def arms(budget: Budget) -> dict[str, Arm]:
    unbalanced = {"num_experts_per_tok": 1, "router_aux_loss_coef": 0.0}
    return {
        "S-BASE": Arm(unbalanced | {"router_type": "base", "router_args": {"solver": "sinkhorn"}}),
        "BASE": Arm(unbalanced | {"router_type": "base", "router_args": {"solver": "auction"}}),
        "REINFORCE": Arm(BALANCED | {"num_experts_per_tok": 1, "router_type": "reinforce"}),
        "top-1": Arm(BALANCED | {"num_experts_per_tok": 1, "router_type": "softmax_topk"}),
    }


def judge(runs: Runs) -> str:
    return lower(runs, "S-BASE", "REINFORCE")


EXPERIMENT = Experiment(
    claim="A balanced assignment (S-BASE) learns better routes than the policy's gradient.",
    source="Unified scaling laws for routed language models, https://arxiv.org/abs/2202.01169",
    paper="S-BASE scales best with experts and size, REINFORCE is close, both before hashing.",
    arms=arms,
    judge=judge,
    equal="training_flops",
)
