"""Where the Trainer's loop calls what hf_moe's trainers do between steps."""

from transformers import TrainerCallback


class RoutingCallback(TrainerCallback):
    """Tells a trainer with MoeTrainerMixin when training begins, and before and after the optimizer moves."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.begin_routing()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.end_sums()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.end_routing_step()
