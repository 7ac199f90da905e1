"""What dpo and grpo share: a policy is trained beside a reference, and nothing but its own loss moves it."""

from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from ..balance.moe_arguments import MoeArguments, moe_argument
from ..host_trl import leave_out_own_aux_loss, show_backbone
from .trainer import MoeTrainerMixin


def off(name: str):
    """The argument `name` of MoeArguments, with 0 for what it is without a word."""
    return field(default=0.0, metadata=MoeArguments.__dataclass_fields__[name].metadata)


@dataclass
class PolicyArguments(MoeArguments):
    """MoeArguments where nothing balances the experts unless the recipe asks for it, whatever the configuration says.

    A balance loss pulls the policy away from its reference; OLMoE (https://arxiv.org/abs/2409.02060) trains DPO
    without one.
    """

    router_aux_loss_coef: float | None = off("router_aux_loss_coef")
    router_z_loss_coef: float | None = off("router_z_loss_coef")
    seq_aux_loss_coef: float | None = off("seq_aux_loss_coef")
    device_aux_loss_coef: float | None = off("device_aux_loss_coef")
    comm_aux_loss_coef: float | None = off("comm_aux_loss_coef")
    router_bias_update_speed: float | None = off("router_bias_update_speed")
    chat_template_path: str | None = field(
        default=None, metadata={"help": "A .jinja file, or the name of a chat template that comes along."}
    )


class MoePolicyMixin(MoeTrainerMixin):
    """MoeTrainerMixin for TRL's trainers of a policy, which compute their loss from a fused head.

    Modules for multi-token prediction stand still. Raises ValueError where they are to learn, or where a selection
    bias would move in the reference, too.
    """

    takes_model_loss = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for given in (*args, *kwargs.values()):  # the reference's log-probabilities may be had while this is made
            if isinstance(given, PreTrainedModel):
                show_backbone(given)
        super().__init__(*args, **kwargs)
        leave_out_own_aux_loss(self)
        if self.ref_model is not None:  # which TRL may have loaded
            show_backbone(self.accelerator.unwrap_model(self.ref_model))

    def find_routing(self) -> None:
        super().find_routing()
        self.balance.multi_token = None
        if smoothing := self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {smoothing}, but the loss of a policy has no labels: set it to 0."
            )
        if ahead := moe_argument(self.args, "mtp_loss_coef"):
            raise ValueError(f"mtp_loss_coef is {ahead}, but a policy is not trained on next tokens: leave it out.")
        if self.bias_speed and self.model is not self.moe and self.args.beta:
            raise ValueError(
                f"router_bias_update_speed is {self.bias_speed}, but the reference of an adapter is the same model "
                "without it, and would move along: set it to 0."
            )
