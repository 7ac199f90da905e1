"""What routers have moved to after a step of which each process has a half: run by torchrun, leaves with it."""

from tests.processes import leave
from tests.training.balance_worker import NONE, train_one_step
from tests.training.models import hf_moe, hf_moe_biased

ONE_GROUP = {"n_group": 1, "topk_group": 1}
MOVED = {  # router -> its state, and what moves it far
    "expert_threshold": ("threshold", {"decay": 0.8}),
    "relu": ("l1_coef", {"l1_start": 1e-3}),
    "null_experts": ("null_bias", {"null_experts": 3}),
}


def moved(accumulation: int, processes: int) -> dict[str, list[list[float]]]:
    found = {}
    for router_type, (name, args) in MOVED.items():
        model = hf_moe(router_type=router_type, router_args=args, **ONE_GROUP)
        train_one_step(model, accumulation, processes, **NONE)
        found[router_type] = [getattr(layer.mlp.gate, name).tolist() for layer in model.model.layers]
    model = hf_moe_biased(**ONE_GROUP)
    by_quantiles = {"router_bias_update": "quantile", "router_bias_update_speed": 1.0}
    train_one_step(model, accumulation, processes, **NONE, **by_quantiles)
    found["quantile"] = [layer.mlp.gate.e_score_correction_bias.tolist() for layer in model.model.layers]
    return found


if __name__ == "__main__":
    leave(moved(1, 2))
