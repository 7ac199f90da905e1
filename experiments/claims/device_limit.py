"""Experts of a token on few devices.

DeepSeek-V2 (https://arxiv.org/abs/2405.04434), 2.2.2: with the experts of a token on at most M = 3 devices the model
is about as good as without a limit. Four groups of experts here, and four experts a token, of half the width.
"""

import torch

from ..experiment import BALANCED, Arm, Budget, Experiment
from ..verdicts import Runs, as_good

GROUPS, FINER = 4, 2


def arms(budget: Budget) -> dict[str, Arm]:
    experts, top_k, width = (budget.fields[x] for x in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"))
    fields = BALANCED | {"num_experts": FINER * experts, "num_experts_per_tok": FINER * top_k, "n_group": GROUPS}
    fields |= {"moe_intermediate_size": width // FINER, "router_args": {"group_score": "best"}}
    names = {"all groups": GROUPS, "3 groups": 3, "2 groups": 2, "1 group": 1}
    return {name: Arm(fields | {"topk_group": limit}) for name, limit in names.items()}


@torch.no_grad()
def groups_reached(trial, model) -> dict[str, float]:
    """How many groups the experts of a token are in, on average."""
    from hf_moe.routers import captured, find_routers

    model.eval()
    with captured(find_routers(model), model.config.num_experts_per_tok) as routings:
        model(trial.text.held_out[: trial.budget.rows].to(model.device), use_cache=False)
    width = model.config.num_experts // GROUPS
    reached = [
        torch.nn.functional.one_hot(x.index_SK // width, GROUPS).amax(dim=1).sum(dim=-1).float().mean()
        for x in routings.values()
    ]
    return {"groups_a_token": torch.stack(reached).mean().item()}


def judge(runs: Runs) -> str:
    return as_good(runs, "3 groups", "all groups")


EXPERIMENT = Experiment(
    claim="Three groups of experts within a token's reach are as good as all.",
    source="DeepSeek-V2, https://arxiv.org/abs/2405.04434, 2.2.2",
    paper="with three devices or more about as good as top-k without a limit.",
    arms=arms,
    judge=judge,
    equal="training_flops",
    measure=groups_reached,
)
