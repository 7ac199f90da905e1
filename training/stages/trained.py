"""What a run trains: a group of parameters, an adapter or a task's experts; checked before it, merged after it."""

import os
import sys

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from ..output.saved_dtype import dtype_to_save
from ..output.saving import after_saving
from ..weights.adapters import AdapterArguments, check_adapter_arguments
from ..weights.esft import EsftArguments, check_esft_arguments, merge_rows
from ..weights.groups import matrices
from ..weights.merging import Changes, merge_adapter
from ..weights.quantized import quantize
from .loading import ModelArguments
from .run import train, write_merged

NO_ADAPTER, NO_ESFT = AdapterArguments(), EsftArguments()
MERGE_BATCHES = 8  # enough to count routes
MATTERS = 0.01  # of the likeliest next tokens: more than ties, which rounding decides


def check_choices(model_args: ModelArguments, adapter_args: AdapterArguments, esft_args: EsftArguments) -> None:
    """Raises ValueError where the arguments contradict each other. Run before anything is loaded."""
    check_adapter_arguments(adapter_args, model_args.trainable)
    given = {} if model_args.trainable == "all" else {"trainable": model_args.trainable}
    if adapter_args.lora_parts is not None:
        given["lora_parts"] = adapter_args.lora_parts
    check_esft_arguments(esft_args, given)
    if model_args.fp8 and adapter_args.lora_base is not None:
        raise ValueError(
            f"fp8 is true and lora_base {adapter_args.lora_base}: FP8 products are made of whole weights; leave one "
            "of them out."
        )
    split = model_args.expert_parallel_size > 1
    on_experts = {"lora_parts": adapter_args.lora_parts} if "routed_experts" in (adapter_args.lora_parts or ()) else {}
    for name, value in (on_experts | {"esft_p": esft_args.esft_p}).items():
        if split and value is not None:
            raise ValueError(
                f"{name} is {value}, which trains parts of experts, and expert_parallel_size is "
                f"{model_args.expert_parallel_size}: leave one of them out, or shard with --accelerate fsdp2."
            )
    whole = {"lora_merge": adapter_args.lora_merge, "lora_base": adapter_args.lora_base}
    for name, value in (whole | {"esft_merge": esft_args.esft_merge}).items():
        if value and (split or os.environ.get("ACCELERATE_USE_FSDP") == "true" or is_deepspeed_zero3_enabled()):
            raise ValueError(
                f"{name} is {value}, which needs whole weights on each process: leave it out, or use zero2."
            )


def store_base(model: PreTrainedModel, adapter_args: AdapterArguments, args: TrainingArguments) -> None:
    """Before an adapter is put on it: the model's matrices in fewer bits, if the arguments say so; says which."""
    if adapter_args.lora_base is not None:
        print(quantize(model, matrices(model), args.device, adapter_args.lora_base), file=sys.stderr)


def merged_dtype(
    dtype: torch.dtype | None, adapter_args: AdapterArguments = NO_ADAPTER, esft_args: EsftArguments = NO_ESFT
) -> torch.dtype | None:
    """The type of the whole model that `merge_trained` is to write; None where it writes none."""
    if adapter_args.lora_merge is not None:
        return getattr(torch, adapter_args.lora_merge)
    return (dtype or torch.float32) if esft_args.esft_merge else None


def merge_trained(
    trainer: Trainer, adapter_args: AdapterArguments = NO_ADAPTER, esft_args: EsftArguments = NO_ESFT
) -> dict[str, float]:
    """Write the whole model to `output_dir`/merged if the arguments say so; returns what that measured."""
    with after_saving(trainer):
        if esft_args.esft_merge:
            merge_rows(trainer.moe)
            write_merged(trainer, trainer.moe, trainer.saved_dtype)
        return save_merged(trainer, adapter_args.lora_merge) if adapter_args.lora_merge is not None else {}


def train_and_merge(
    trainer: Trainer,
    checkpoint: str | None,
    model_args: ModelArguments,
    adapter_args: AdapterArguments = NO_ADAPTER,
    esft_args: EsftArguments = NO_ESFT,
) -> dict[str, float]:
    """Train from `checkpoint` on, save, and write the whole model beside an adapter or rows; returns the metrics."""
    dtype = dtype_to_save(model_args, trainer.args)
    trainer.merged_dtype = merged_dtype(dtype, adapter_args, esft_args)
    return train(trainer, checkpoint, dtype) | merge_trained(trainer, adapter_args, esft_args)


def advice(changes: Changes, dtype: str) -> str:
    """What the changes mean: a route matters where the next token changes with it."""
    if changes.tokens == 0:
        return ": it writes what the adapter does"
    if changes.tokens <= MATTERS * changes.all_tokens:
        return ": ties, which rounding decides"
    return ": --lora_merge float32 changes fewer" if dtype != "float32" else ""


def save_merged(trainer: Trainer, dtype: str) -> dict[str, float]:
    """The model with its adapter merged to `output_dir`/merged; returns the shares of what this changed.

    The routes are those of some of the trainer's batches, without autocast.
    """
    batches = trainer.some_batches(MERGE_BATCHES)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    merged, changes = merge_adapter(model, getattr(torch, dtype), batches)
    write_merged(trainer, merged)
    if trainer.is_world_process_zero():
        print(f"merged in {dtype}, whose rounding changed {changes}{advice(changes, dtype)}", file=sys.stderr)
    metrics = {
        "merge_changed_routes": changes.routes / changes.all_routes,
        "merge_changed_tokens": changes.tokens / changes.all_tokens,
    }
    trainer.save_metrics("merge", metrics)
    return metrics
