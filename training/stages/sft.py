"""Supervised fine-tuning: `hf-moe train RECIPE.yaml [--key value ...]`, with TRL's SFTTrainer underneath."""

import sys

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.chat_templates import check_template, find_template, use_template
from ..data.mixture import mix
from ..data.sources import DataArguments, by_label, label, load_sources, together
from ..data.token_cache import can_tokenise, tokenised
from ..trainers.pipeline.arguments import (
    NO_PIPELINE,
    PipelineArguments,
    check_layers,
    check_micro_batches,
    check_pipeline,
)
from ..trainers.pipeline.trainer import trainer_for
from ..trainers.sft_trainer import MoeSFTConfig, MoeSFTTrainer
from ..weights.adapters import AdapterArguments
from ..weights.esft import EsftArguments, specialise
from .adapted import load_adapted
from .loading import ModelArguments, keep_selection_bias, load_tokenizer
from .new_tokens import take_template, trained_tokens
from .run import Trained, checkpoint_to_resume, say_summary
from .trained import NO_ADAPTER, NO_ESFT, check_choices, train_and_merge

ARGUMENTS = (ModelArguments, DataArguments, MoeSFTConfig, AdapterArguments, EsftArguments, PipelineArguments)


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: MoeSFTConfig,
    adapter_args: AdapterArguments = NO_ADAPTER,
    esft_args: EsftArguments = NO_ESFT,
    pipeline_args: PipelineArguments = NO_PIPELINE,
) -> Trained:
    """Train, evaluate before and after, save to `output_dir`; the metrics have `eval_loss_before`."""
    check_choices(model_args, adapter_args, esft_args)
    check_pipeline(pipeline_args, args, model_args, adapter_args, esft_args)
    check_micro_batches(args, "gradient_accumulation_steps")
    checkpoint = checkpoint_to_resume(args)
    args.chat_template_path = find_template(args.chat_template_path)
    sources, held_out = load_sources(data_args, args, text_field=args.dataset_text_field)
    args.eval_on_start = bool(held_out) and checkpoint is None
    source = checkpoint or model_args.model_name_or_path
    tokenizer = load_tokenizer(source, model_args, args)
    check_layers(source, model_args, args)
    new = take_template(tokenizer, args) or trained_tokens(checkpoint)
    use_template(tokenizer, args)
    groups = by_label(sources, held_out)
    tokenises = can_tokenise(list(groups.values()), tokenizer, args)
    check_template(tokenizer, groups, args.dataset_num_proc, roles_alone=tokenises)
    if tokenises:
        sources = {name: tokenised(rows, name, tokenizer, args) for name, rows in sources.items()}
        held_out = {
            name: tokenised(rows, label(name), tokenizer, args, args.eval_packing) for name, rows in held_out.items()
        }
        args.assistant_only_loss = False  # the labels say it, and TRL would look for conversations
    train_rows = mix(sources, data_args.train_weights, args.seed)
    eval_rows = together(held_out, data_args.eval_by_source)

    # A checkpoint of an adapter, or of some experts, does not hold the model.
    whole = adapter_args.lora_parts is None and esft_args.esft_p is None
    weights = source if whole else model_args.model_name_or_path
    if esft_args.esft_p is not None:
        keep_selection_bias(args)
    trainer = build_trainer(weights, model_args, args, adapter_args, esft_args, tokenizer, train_rows, eval_rows, new)
    if esft_args.esft_p is not None:
        print(specialise(trainer, esft_args, checkpoint), file=sys.stderr)
    metrics = train_and_merge(trainer, checkpoint, model_args, adapter_args, esft_args)
    say_summary(trainer, metrics)
    return Trained(trainer, metrics)


def build_trainer(
    source: str,
    model_args: ModelArguments,
    args: MoeSFTConfig,
    adapter_args: AdapterArguments,
    esft_args: EsftArguments,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Dataset,
    eval_rows: Dataset | dict[str, Dataset] | None,
    new: list[int],
) -> MoeSFTTrainer:
    """The trainer with its model loaded from `source`, to which the tokens `new` are new. Raises ValueError if no row
    is left to train on."""
    model = load_adapted(source, model_args, args, adapter_args, tokenizer, new, esft_args)
    return trainer_for(args)(
        model=model, args=args, processing_class=tokenizer, train_dataset=train_rows, eval_dataset=eval_rows
    )
