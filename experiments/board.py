"""The board: every router in ROUTERS, and every way to balance, in one architecture with one budget.

A router joins by being registered, from a plugin, too.
"""

from hf_moe.model.routing import ROUTERS

from .experiment import BALANCED, BIAS, Arm, Budget, Experiment

# What a router needs, beside its name, to be as good as it can be here; others have the balance loss alone.
SETTINGS = {
    "gshard": {"num_experts_per_tok": 2},
    "base": {"router_args": {"solver": "sinkhorn"}, "router_aux_loss_coef": 0.0},
    "hash": {"router_aux_loss_coef": 0.0},
    "expert_choice": {"router_aux_loss_coef": 0.0},
    "dense": {"router_aux_loss_coef": 0.0},
}
# Ways to balance, on the router that each is known with.
BALANCING = {
    "softmax_topk, no balancing": {"router_type": "softmax_topk", "router_aux_loss_coef": 0.0},
    "softmax_topk, z-loss too": {"router_type": "softmax_topk", "router_z_loss_coef": 1e-3},
    "softmax_topk, within sequences": {"router_type": "softmax_topk", "seq_aux_loss_coef": 0.01},
    "sigmoid_topk, bias": {"router_type": "sigmoid_topk", **BIAS},
    "softmax_topk, capacity 1.25": {"router_type": "softmax_topk", "expert_capacity_factor": 1.25},
}


def arms(budget: Budget) -> dict[str, Arm]:
    found = {name: BALANCED | {"router_type": name} | SETTINGS.get(name, {}) for name in ROUTERS}
    found |= {name: BALANCED | fields for name, fields in BALANCING.items()}
    return {name: Arm(fields) for name, fields in found.items()}


BOARD = Experiment(
    claim="Which router is best at one budget?",
    source="the board asks, and answers with a table",
    paper="no single one compares them all",
    arms=arms,
    judge=lambda runs: "see the table",
)
