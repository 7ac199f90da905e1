"""Continued training that wrecks what it goes on with is stopped while it begins.

A learning rate that random weights bear can be far too high for trained ones; re-warming to one that they bear raises
the loss a little, and passes (https://arxiv.org/abs/2403.08763).
"""

import math

from transformers import TrainerCallback

from ..data.sources import loss_names

SHARE = 0.01  # of the steps
RISE = 0.2  # nats: a perplexity 22% higher


class RateGuard(TrainerCallback):
    """Evaluates after the first percent of the steps and where the warm-up ends, if there are held-out rows.

    Raises ValueError where their loss has risen by more than RISE since before the first step.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.before: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        steps = state.max_steps
        self.at = {math.ceil(SHARE * steps), min(args.get_warmup_steps(steps) + 1, steps)}

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.eval_dataset is not None and state.global_step in self.at:
            control.should_evaluate = True

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        for name in loss_names(self.trainer).keys() & (metrics or {}).keys():
            before = self.before.setdefault(name, metrics[name])
            if state.global_step <= max(self.at) and not metrics[name] <= before + RISE:
                raise ValueError(
                    f"{name} rose from {before:.3f} to {metrics[name]:.3f} in the first {state.global_step} of "
                    f"{state.max_steps:,} steps: learning_rate {args.learning_rate:.3g} is too high for these "
                    "weights; give a lower one."
                )
