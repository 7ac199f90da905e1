"""TRL's direct preference optimisation for mixture-of-experts models."""

from dataclasses import dataclass

from trl import DPOConfig, DPOTrainer

from .policy import MoePolicyMixin, PolicyArguments

MODEL_INPUTS = ("input_ids", "attention_mask")


@dataclass
class MoeDPOConfig(PolicyArguments, DPOConfig):
    """DPOConfig with what MoeDPOTrainer adds."""


class MoeDPOTrainer(MoePolicyMixin, DPOTrainer):
    """TRL's DPOTrainer (https://arxiv.org/abs/2305.18290) with routing that is right; see MoeTrainerMixin.

    Balance losses, where a recipe asks for them, count the tokens of the chosen and the rejected texts alike, for both
    pass through the policy; never those of the reference.
    """

    def model_inputs(self, inputs: dict) -> dict:
        return {name: inputs[name] for name in MODEL_INPUTS}
