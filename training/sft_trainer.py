"""TRL's supervised fine-tuning for mixture-of-experts models."""

from dataclasses import dataclass

from trl import SFTConfig, SFTTrainer

from .moe_arguments import MoeArguments
from .trainer import MoeTrainerMixin


@dataclass
class MoeSFTConfig(MoeArguments, SFTConfig):
    """SFTConfig with what MoeSFTTrainer adds."""


class MoeSFTTrainer(MoeTrainerMixin, SFTTrainer):
    """TRL's SFTTrainer with routing that is right in training; see MoeTrainerMixin.

    TRL's fused head never calls the model's own forward, and takes Mixtral's balance loss, which pools the layers and
    knows neither the z-loss nor other score functions. Here the losses are hf_moe's.
    """

    takes_model_loss = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.aux_loss_enabled = False  # TRL's own
