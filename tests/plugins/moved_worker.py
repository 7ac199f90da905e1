"""The thresholds after a step of which each process has a half: run by torchrun, leaves with them."""

from hf_moe.plugins import load_plugin
from tests.plugins.conftest import FOLDER
from tests.processes import leave
from tests.training.balance_worker import NONE, train_one_step
from tests.training.models import hf_moe


def thresholds(accumulation: int, processes: int) -> list[list[float]]:
    load_plugin(FOLDER / "threshold.py")
    model = hf_moe(router_type="threshold", num_experts_per_tok=3, n_group=1, topk_group=1)
    train_one_step(model, accumulation, processes, **NONE)
    return [layer.mlp.gate.threshold.tolist() for layer in model.model.layers]


if __name__ == "__main__":
    leave(thresholds(1, 2))
