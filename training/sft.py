"""Supervised fine-tuning: `hf-moe train RECIPE.yaml [--key value ...]`, with TRL's SFTTrainer underneath."""

import sys

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .adapters import AdapterArguments, add_adapter
from .arguments import DataArguments, ModelArguments, RecipeParser
from .esft import EsftArguments, specialise
from .run import (
    check_kept,
    check_template,
    checkpoint_to_resume,
    choose_trained,
    find_template,
    keep_selection_bias,
    load_data,
    load_tokenizer,
    load_trained_model,
    say_summary,
    train,
)
from .sft_trainer import MoeSFTConfig, MoeSFTTrainer
from .trained import NO_ADAPTER, NO_ESFT, check_choices, merge_trained

ARGUMENTS = (ModelArguments, DataArguments, MoeSFTConfig, AdapterArguments, EsftArguments)


def parse(argv: list[str]) -> tuple[ModelArguments, DataArguments, MoeSFTConfig, AdapterArguments, EsftArguments]:
    """The arguments of a run from [recipe, --key, value, ...]."""
    return RecipeParser(ARGUMENTS).parse(argv)


def main(argv: list[str]) -> dict[str, float]:
    """Run the recipe argv[0] with the arguments after it. Raises ValueError or OSError for the user's mistakes."""
    return run(*parse(argv))


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: MoeSFTConfig,
    adapter_args: AdapterArguments = NO_ADAPTER,
    esft_args: EsftArguments = NO_ESFT,
) -> dict[str, float]:
    """Train, evaluate before and after, save to `output_dir`; returns the metrics, with `eval_loss_before`."""
    check_choices(model_args, adapter_args, esft_args)
    checkpoint = checkpoint_to_resume(args)
    args.chat_template_path = find_template(args.chat_template_path)
    train_rows, eval_rows = load_data(data_args, args, text_field=args.dataset_text_field)
    args.eval_on_start = eval_rows is not None and checkpoint is None
    source = checkpoint or model_args.model_name_or_path
    tokenizer = load_tokenizer(source, model_args, args)
    check_template(tokenizer, train_rows, args)

    # A checkpoint of an adapter, or of some experts, does not hold the model.
    whole = adapter_args.lora_parts is None and esft_args.esft_p is None
    weights = source if whole else model_args.model_name_or_path
    if esft_args.esft_p is not None:
        keep_selection_bias(args)
    trainer = build_trainer(weights, model_args, args, adapter_args, tokenizer, train_rows, eval_rows)
    if esft_args.esft_p is not None:
        print(specialise(trainer, esft_args, checkpoint), file=sys.stderr)
    metrics = train(trainer, checkpoint)
    metrics = metrics | merge_trained(trainer, adapter_args, esft_args)
    say_summary(trainer, metrics)
    return metrics


def build_trainer(
    source: str,
    model_args: ModelArguments,
    args: MoeSFTConfig,
    adapter_args: AdapterArguments,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Dataset,
    eval_rows: Dataset | None,
) -> MoeSFTTrainer:
    """The trainer with its model loaded from `source`. Raises ValueError if no row is left to train on."""
    model = load_trained_model(source, model_args, args)
    if adapter_args.lora_parts is None:
        choose_trained(model, model_args.trainable, args)
    else:
        model, covered = add_adapter(model, adapter_args)
        print(covered, file=sys.stderr)
    trainer = MoeSFTTrainer(
        model=model, args=args, processing_class=tokenizer, train_dataset=train_rows, eval_dataset=eval_rows
    )
    for name, given, kept in (
        ("train_data", train_rows, trainer.train_dataset),
        ("eval_data", eval_rows, trainer.eval_dataset),
    ):
        check_kept(name, given, kept, args)
    return trainer
