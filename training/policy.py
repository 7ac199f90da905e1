"""What dpo and grpo share: a policy is trained beside a reference, and nothing but its own loss moves it."""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .moe_arguments import MoeArguments, moe_argument
from .run import find_template
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

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.aux_loss_enabled = False  # TRL's own, which pools the layers

    def find_routing(self) -> None:
        super().find_routing()
        self.balance.multi_token = None
        if ahead := moe_argument(self.args, "mtp_loss_coef"):
            raise ValueError(f"mtp_loss_coef is {ahead}, but a policy is not trained on next tokens: leave it out.")
        if self.bias_speed and self.model is not self.moe and self.args.beta:
            raise ValueError(
                f"router_bias_update_speed is {self.bias_speed}, but the reference of an adapter is the same model "
                "without it, and would move along: set it to 0."
            )


def use_template(tokenizer: PreTrainedTokenizerBase, name: str | None) -> None:
    """Give the tokenizer the chat template in a file, or the shipped one of that name."""
    if name is not None:
        path = Path(find_template(name))
        if not path.is_file():
            raise FileNotFoundError(f"chat_template_path {name} is no file and no template that comes along.")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
