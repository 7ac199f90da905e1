"""What dpo and grpo share: a policy is trained beside a reference, and nothing but its own loss moves it."""

import sys
from pathlib import Path
from typing import NamedTuple

from peft import LoraConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments

from ..data.chat_templates import find_template, use_template
from ..weights.adapters import AdapterArguments, check_coverage, lora_config
from ..weights.esft import EsftArguments
from .loading import ModelArguments, choose_trained, load_tokenizer, load_trained_model
from .new_tokens import give_rows
from .trained import NO_ESFT, store_base


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
