"""What dpo and grpo share: a policy is trained beside a reference, and nothing but its own loss moves it."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from .adapters import AdapterArguments, check_coverage, lora_config
from .arguments import ModelArguments
from .chat_templates import find_template, use_template
from .esft import EsftArguments
from .host_trl import leave_out_own_aux_loss
from .moe_arguments import MoeArguments, moe_argument
from .new_tokens import give_rows
from .run import choose_trained, load_tokenizer, load_trained_model
from .trained import NO_ESFT, store_base
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
        leave_out_own_aux_loss(self)

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


def load_tokenizer_and_template(
    source: str, model_args: ModelArguments, args: TrainingArguments
) -> PreTrainedTokenizerBase:
    """The tokenizer in `source`, with the chat template that the arguments name. Raises ValueError or OSError."""
    tokenizer = load_tokenizer(source, model_args, args)
    if args.chat_template_path is not None:
        args.chat_template_path = find_template(args.chat_template_path)
        if not Path(args.chat_template_path).is_file():
            raise FileNotFoundError(
                f"chat_template_path {args.chat_template_path} is no file and no template that comes along."
            )
    use_template(tokenizer, args)
    return tokenizer


class Policy(NamedTuple):
    """A model before any step, and the adapter that TRL is to put on it, if any, so that it knows the reference."""

    model: PreTrainedModel
    peft_config: LoraConfig | None = None
    targets: dict[str, str] | None = None  # the weights that the adapter is to reach, and their parts

    def say_coverage(self, trainer: Trainer, adapter_args: AdapterArguments) -> None:
        """What the adapter reaches. Raises ValueError as `check_coverage`."""
        if self.peft_config is not None:
            print(check_coverage(trainer.model, self.targets, adapter_args.lora_parts), file=sys.stderr)


def load_policy(
    model_args: ModelArguments,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    adapter_args: AdapterArguments,
    esft_args: EsftArguments = NO_ESFT,
) -> Policy:
    """The model that a run begins with, also where it is resumed: the trainer then restores the policy's weights.

    With a row for each token of `tokenizer`.
    """
    model = load_trained_model(model_args.model_name_or_path, model_args, args)
    give_rows(model, tokenizer, args, model_args, adapter_args, esft_args)
    if adapter_args.lora_parts is None:
        choose_trained(model, model_args.trainable, args, says=esft_args.esft_p is None)
        return Policy(model)
    store_base(model, adapter_args, args)
    return Policy(model, *lora_config(model, adapter_args))
