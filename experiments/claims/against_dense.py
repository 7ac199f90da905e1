"""A mixture of experts beside the dense model that computes as much.

OLMoE (https://arxiv.org/abs/2409.02060), figure 4: the mixture of experts reaches the dense model's loss with about a
third of its FLOPs, and in about half the time.
"""

from ..experiment import BALANCED, Arm, Budget, Experiment
from ..verdicts import Runs, lower, mean_losses


def arms(budget: Budget) -> dict[str, Arm]:
    return {"mixture": Arm(BALANCED), "dense": Arm(budget.dense)}


def judge(runs: Runs) -> str:
    return lower(runs, "mixture", "dense")


def reached(runs: Runs) -> float | None:
    """Share of its steps after which the mixture's training loss is the dense model's last, each smoothed."""
    mixture, (*_, last) = (smooth(mean_losses(runs[arm])) for arm in ("mixture", "dense"))
    return next((i / len(mixture) for i, loss in enumerate(mixture, 1) if loss <= last), None)


def smooth(losses: list[float]) -> list[float]:
    """Means of the last twentieth of the steps."""
    window = max(1, len(losses) // 20)
    return [sum(losses[max(0, i - window) : i]) / min(i, window) for i in range(1, len(losses) + 1)]


def says(runs: Runs) -> list[str]:
    share = reached(runs)
    if share is None:
        return ["The mixture did not reach the dense model's last training loss."]
    return [f"The mixture reached the dense model's last training loss after {share:.0%} of its FLOPs."]


EXPERIMENT = Experiment(
    claim="A mixture of experts reaches a dense model's loss with fewer FLOPs.",
    source="OLMoE, https://arxiv.org/abs/2409.02060, figure 4",
    paper="about a third of the FLOPs at 1.3 billion active parameters, with both at the same FLOPs a token.",
    arms=arms,
    judge=judge,
    equal="training_flops",
    says=says,
)
