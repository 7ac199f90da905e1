"""Direct preference optimisation: a recipe with `stage: dpo`, with TRL's DPOTrainer underneath."""

import copy
import sys

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .adapters import AdapterArguments
from .arguments import DataArguments, ModelArguments
from .dpo_trainer import MoeDPOConfig, MoeDPOTrainer
from .esft import EsftArguments, specialise
from .policy import load_policy, load_tokenizer_and_template
from .run import (
    checkpoint_to_resume,
    load_data,
    say_summary,
    train,
)
from .saved_dtype import dtype_to_save
from .trained import NO_ADAPTER, NO_ESFT, check_choices, merge_trained

ARGUMENTS = (ModelArguments, DataArguments, MoeDPOConfig, AdapterArguments, EsftArguments)
# The second: conversations or texts that begin with the same prompt.
COLUMNS = (("prompt", "chosen", "rejected"), ("chosen", "rejected"))


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
    tokenizer = load_tokenizer_and_template(checkpoint or model_args.model_name_or_path, model_args, args, train_rows)
    trainer = build_trainer(model_args, args, adapter_args, esft_args, tokenizer, train_rows, eval_rows)
    if esft_args.esft_p is not None:
        print(specialise(trainer, esft_args, checkpoint), file=sys.stderr)
    metrics = train(trainer, checkpoint, dtype_to_save(model_args, args))
    metrics = metrics | merge_trained(trainer, adapter_args, esft_args)
    say_summary(trainer, metrics)
    return metrics


def build_trainer(
    model_args: ModelArguments,
    args: MoeDPOConfig,
    adapter_args: AdapterArguments,
    esft_args: EsftArguments,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Dataset,
    eval_rows: Dataset | dict[str, Dataset] | None,
) -> MoeDPOTrainer:
    """The trainer before any step.

    The reference is a copy of the model, router and selection bias included; of an adapter, the model without it.
    """
    policy, reference = load_policy(model_args, args, adapter_args, esft_args), None
    if policy.peft_config is None and not args.precompute_ref_log_probs:
        reference = copy.deepcopy(policy.model).requires_grad_(False)
    trainer = MoeDPOTrainer(
        model=policy.model,
        ref_model=reference,
        args=args,
        processing_class=tokenizer,
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        peft_config=policy.peft_config,
    )
    policy.say_coverage(trainer, adapter_args)
    return trainer
