"""Finer experts, as many times more of them a token.

DeepSeekMoE (https://arxiv.org/abs/2401.06066), figure 3, and OLMoE (https://arxiv.org/abs/2409.02060), figure 5: at
the same parameters, active ones too, more and smaller experts lower the loss.
"""

from ..experiment import BALANCED, Arm, Budget, Experiment
from ..verdicts import Runs, lower


def arms(budget: Budget) -> dict[str, Arm]:
    experts, top_k = budget.fields["num_experts"], budget.fields["num_experts_per_tok"]
    width = budget.fields["moe_intermediate_size"]

    def cut(pieces: int) -> Arm:
        fields = {"num_experts": experts * pieces, "num_experts_per_tok": top_k * pieces}
        return Arm(BALANCED | fields | {"moe_intermediate_size": width // pieces})

    return {"whole": cut(1), "halves": cut(2), "quarters": cut(4)}


def judge(runs: Runs) -> str:
    return lower(runs, "quarters", "whole")


EXPERIMENT = Experiment(
    claim="Finer experts at equal active parameters lower the loss.",
    source="DeepSeekMoE, https://arxiv.org/abs/2401.06066, figure 3; OLMoE, figure 5",
    paper="more and finer experts of the same total are better, by less and less.",
    arms=arms,
    judge=judge,
    equal=None,  # the router grows with the experts: by 3% of these small models' active parameters
)
