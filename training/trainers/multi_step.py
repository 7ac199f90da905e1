"""The multi-step schedule of DeepSeek LLM: warm-up, a constant learning rate, and drops near the end.

Paper: https://arxiv.org/abs/2401.02954, 2.3. After 80% of the tokens 31.6% of the maximum, after 90% 10%. A run that
goes on with more data can start from a checkpoint before the drops.
"""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, TrainingArguments

CONSTANT = (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)


def multi_step_schedule(
    optimizer: Optimizer, warmup_steps: int, total_steps: int, milestones: list[float], gamma: float
) -> LambdaLR:
    """Times `gamma` at each milestone, a fraction of `total_steps`; linear from 0 over `warmup_steps`."""
    drops = [math.ceil(round(milestone * total_steps, 6)) for milestone in milestones]

    def scale(step: int) -> float:
        warm = min(1.0, step / warmup_steps) if warmup_steps else 1.0
        return warm * gamma ** sum(step >= drop for drop in drops)

    return LambdaLR(optimizer, scale)


def check_milestones(milestones: list[float], gamma: float, args: TrainingArguments) -> None:
    """Raises ValueError for milestones that are no rising fractions, or under another schedule."""
    if sorted(set(milestones)) != milestones or not all(0 < milestone < 1 for milestone in milestones):
        raise ValueError(f"lr_milestones is {milestones}; it must be fractions of the run that rise, as 0.8 0.9.")
    if not 0 < gamma < 1:
        raise ValueError(f"lr_gamma is {gamma}; it must be between 0 and 1.")
    if args.lr_scheduler_type not in CONSTANT:
        raise ValueError(
            f"lr_scheduler_type is {args.lr_scheduler_type.value}, and lr_milestones drop a constant learning rate: "
            "set it to constant_with_warmup."
        )
