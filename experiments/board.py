"""The board: every router in ROUTERS, and every way to balance, in one architecture with one budget.

A router joins by being registered, from a plugin, too.
"""

from hf_moe.model.routing import ROUTERS

from .experiment import BALANCED, BIAS, Arm, Budget, Experiment

UNBALANCED = {"router_aux_loss_coef": 0.0}
SIGMOID_WITH_BIAS = {"router_type": "sigmoid_topk", **BIAS}


def settings(budget: Budget) -> dict[str, dict]:
    """What a router needs, beside its name, to be as good as it can be here; others have the balance loss alone.

    Of those that give tokens different numbers of experts the mean is K: a state holds it there, but for top-p's.
    """
    twice = {"num_experts_per_tok": 2 * budget.fields["num_experts_per_tok"]}
    return {
        "gshard": {"num_experts_per_tok": 2},
        "base": UNBALANCED | {"router_args": {"solver": "sinkhorn"}},
        "hash": UNBALANCED,
        "expert_choice": UNBALANCED,
        "dense": UNBALANCED,
        "top_p": twice,
        "expert_threshold": UNBALANCED,
        "relu": UNBALANCED,
        "null_experts": twice | {"router_args": {"null_experts": budget.fields["num_experts"]}},
    }


# Ways to balance, on the router that each is known with.
BALANCING = {
    "softmax_topk, no balancing": Arm(UNBALANCED | {"router_type": "softmax_topk"}),
    "softmax_topk, z-loss too": Arm(BALANCED | {"router_type": "softmax_topk", "router_z_loss_coef": 1e-3}),
    "softmax_topk, within sequences": Arm(BALANCED | {"router_type": "softmax_topk", "seq_aux_loss_coef": 0.01}),
    "softmax_topk, capacity 1.25": Arm(BALANCED | {"router_type": "softmax_topk", "expert_capacity_factor": 1.25}),
    "sigmoid_topk, bias": Arm(SIGMOID_WITH_BIAS),
    "sigmoid_topk, bias of zero mean": Arm(SIGMOID_WITH_BIAS, {"router_bias_update": "zero_mean"}),
    "sigmoid_topk, bias by quantiles": Arm(
        SIGMOID_WITH_BIAS, {"router_bias_update": "quantile", "router_bias_update_speed": 0.1}
    ),
}


def arms(budget: Budget) -> dict[str, Arm]:
    own = settings(budget)
    return {name: Arm(BALANCED | {"router_type": name} | own.get(name, {})) for name in ROUTERS} | BALANCING


BOARD = Experiment(
    claim="Which router is best at one budget?",
    source="the board asks, and answers with a table",
    paper="no single one compares them all",
    arms=arms,
    judge=lambda runs: "see the table",
)
