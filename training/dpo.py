"""Direct preference optimisation: a recipe with `stage: dpo`, with TRL's DPOTrainer underneath."""

import copy
import sys

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .adapters import AdapterArguments, check_coverage, lora_config
from .arguments import DataArguments, ModelArguments, RecipeParser
from .dpo_trainer import MoeDPOConfig, MoeDPOTrainer
from .esft import EsftArguments, specialise
from .policy import use_template
from .run import (
    check_template,
    checkpoint_to_resume,
    choose_trained,
    load_data,
    load_tokenizer,
    load_trained_model,
    say_summary,
    train,
)
from .trained import NO_ADAPTER, NO_ESFT, check_choices, merge_trained, store_base

ARGUMENTS = (ModelArguments, DataArguments, MoeDPOConfig, AdapterArguments, EsftArguments)
# The second: conversations or texts that begin with the same prompt.
COLUMNS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, MoeDPOConfig, AdapterArguments, EsftArguments]:
    """The arguments of a run from [recipe, --key, value, ...]."""
    return RecipeParser(ARGUMENTS).parse(argv)


def main(argv: list[str]) -> dict[str, float]:
    """Run the recipe argv[0] with the arguments after it. Raises ValueError or OSError for the user's mistakes."""
    return run(*parse(argv))


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: MoeDPOConfig,
    adapter_args: AdapterArguments = NO_ADAPTER,
    esft_args: EsftArguments = NO_ESFT,
) -> dict[str, float]:
    """Train on pairs of a chosen and a rejected text, evaluate before and after, save; returns the metrics."""
    check_choices(model_args, adapter_args, esft_args)
    checkpoint = checkpoint_to_resume(args)
    train_rows, eval_rows = load_data(data_args, args, kinds=COLUMNS)
    args.eval_on_start = eval_rows is not None and checkpoint is None
    tokenizer = load_tokenizer(checkpoint or model_args.model_name_or_path, model_args, args)
    use_template(tokenizer, args.chat_template_path)
    check_template(tokenizer, train_rows, args)
    trainer = build_trainer(model_args, args, adapter_args, tokenizer, train_rows, eval_rows)
    if esft_args.esft_p is not None:
        print(specialise(trainer, esft_args, checkpoint), file=sys.stderr)
    metrics = train(trainer, checkpoint)
    metrics = metrics | merge_trained(trainer, adapter_args, esft_args)
    say_summary(trainer, metrics)
    return metrics


def build_trainer(
    model_args: ModelArguments,
    args: MoeDPOConfig,
    adapter_args: AdapterArguments,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Dataset,
    eval_rows: Dataset | None,
) -> MoeDPOTrainer:
    """The trainer with policy and reference as they are before any step: resuming restores the policy's weights.

    The reference is a copy of the model, router and selection bias included; of an adapter, the model without it.
    """
    model = load_trained_model(model_args.model_name_or_path, model_args, args)
    config, targets, reference = None, {}, None
    if adapter_args.lora_parts is None:
        if not args.precompute_ref_log_probs:
            reference = copy.deepcopy(model).requires_grad_(False)
        choose_trained(model, model_args.trainable, args)
    else:
        store_base(model, adapter_args, args)
        config, targets = lora_config(model, adapter_args)
    trainer = MoeDPOTrainer(
        model=model,
        ref_model=reference,
        args=args,
        processing_class=tokenizer,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        peft_config=config,
    )
    if config is not None:
        print(check_coverage(trainer.model, targets, adapter_args.lora_parts), file=sys.stderr)
    return trainer
