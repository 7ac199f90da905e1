"""One expert that every token meets.

DeepSeekMoE (https://arxiv.org/abs/2401.06066), figure 3, finds that it helps; OLMoE
(https://arxiv.org/abs/2409.02060), figure 6, that it does not.
"""

from ..experiment import BALANCED, Arm, Budget, Experiment
from ..verdicts import Runs, lower


def arms(budget: Budget) -> dict[str, Arm]:
    experts, top_k = budget.fields["num_experts"], budget.fields["num_experts_per_tok"]
    shared = {"n_shared_experts": 1, "num_experts": experts - 1, "num_experts_per_tok": top_k - 1}
    return {"shared": Arm(BALANCED | shared), "all routed": Arm(BALANCED)}


def judge(runs: Runs) -> str:
    return lower(runs, "shared", "all routed")


EXPERIMENT = Experiment(
    claim="Of a token's experts one that all tokens share lowers the loss.",
    source="DeepSeekMoE, https://arxiv.org/abs/2401.06066, figure 3; against it OLMoE, figure 6",
    paper="DeepSeekMoE: better on most tasks; OLMoE: slightly worse, and not used.",
    arms=arms,
    judge=judge,
    equal="training_flops",
)
