"""Saving that loses no weights: what goes with them is tried before the first step, and in the end they come first."""

import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.utils import logging

from hf_moe.generation_settings import mend_generation_config
from hf_moe.hub.card import render_card
from hf_moe.hub.folder import WEIGHTS

from ..balance.moe_arguments import row_processes
from ..host import PREFIX_CHECKPOINT_DIR
from ..weights.esft import chosen_experts, save_rows
from .checkpoints import ADAPTER_FILE, last_checkpoint
from .saved_dtype import as_written

TRIED = ".tried"  # within output_dir, for as long as it takes
BLOCK = 512  # bytes of one of `st_blocks`
LOGS = 2**18  # bytes for a short run's logs and their picture


def try_saving(trainer: Trainer) -> None:
    """Write to `output_dir` all that goes with the weights, and take it away again.

    Raises ValueError or OSError of one line where something of it cannot be written, or the weights have no room.
    """
    mend(trainer.moe)
    if not trainer.args.should_save:
        return
    output = Path(trainer.args.output_dir)
    folder = output / TRIED
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with no_bars():
            trainer.save_without_weights(folder)
        if not any(folder.glob("*.safetensors")):
            kind = "adapter" if trainer.model is not trainer.moe else "expert_rows"
            save_file({"none": torch.zeros(0)}, folder / WEIGHTS.get(kind, "model.safetensors"))
        render_card(folder, folder)
        beside = sum(path.stat().st_blocks * BLOCK for path in folder.rglob("*"))
    except Exception as error:  # tokenizers and templates raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"What goes with the weights cannot be saved to output_dir {output}: {reason}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    check_room(output, bytes_to_write(trainer, beside) + LOGS, trainer.args)


@contextmanager
def no_bars() -> Iterator[None]:
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def mend(model: nn.Module) -> None:
    """Leave out of the model's generation config what no save would take; says so in one line."""
    config = getattr(model, "generation_config", None)
    if config is not None and (left_out := mend_generation_config(config, model.config.get_text_config().vocab_size)):
        print(left_out, file=sys.stderr)


# ---- room on the disk ----


def bytes_to_write(trainer: Trainer, beside: int) -> int:
    """About how many bytes a run still writes: checkpoints that stay at a time, and what is saved in the end.

    `beside`: those of the files that go with the weights, each time. Optimizers are counted by the two moments of
    Adam, where one of these is asked for, and not otherwise.
    """
    model, args = trainer.moe, trainer.args
    weights = trainer.weights_to_save()
    trained = [x for x in weights if x.requires_grad]
    rows = bool(chosen_experts(model))
    saved = trained if rows or trainer.model is not model else weights
    moments = 2 if args.optim.startswith("adamw_torch") and args.optim.count("bit") == 0 else 0
    averaged = 0 if trainer.average is None else 4 * count(trained)
    checkpoint = size(saved) + averaged + (0 if args.save_only_model else moments * size(trained))
    casts = whole(trainer) and trainer.final_dtype is not None
    final = count(saved) * as_written(trainer.final_dtype).itemsize if casts else size(saved)
    average = final if trainer.average is not None else 0
    merged = count(model.parameters()) * trainer.merged_dtype.itemsize if trainer.merged_dtype is not None else 0
    parts = [final, average, merged] + new_checkpoints(trainer, args) * [checkpoint]
    return sum(part + beside for part in parts if part)


def whole(trainer: Trainer) -> bool:
    return trainer.model is trainer.moe and not chosen_experts(trainer.moe)


def count(weights) -> int:
    return sum(getattr(x, "ds_numel", x.numel()) for x in weights)  # under ZeRO-3 a process holds a part of each


def size(weights) -> int:
    return sum(getattr(x, "ds_numel", x.numel()) * x.element_size() for x in weights)


def new_checkpoints(trainer: Trainer, args: TrainingArguments) -> int:
    """How many checkpoints there are at a time beside those that lie there now, as far as it can be known."""
    saves = planned_saves(trainer, args)
    if args.save_total_limit:
        there = len(list(Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")))
        saves = min(saves, max(1, args.save_total_limit + 1 - there))  # the oldest goes after the newest has come
    return saves


def planned_saves(trainer: Trainer, args: TrainingArguments) -> int:
    if args.save_strategy == "no":
        return 0
    if args.save_strategy == "epoch" and args.max_steps <= 0:
        return math.ceil(args.num_train_epochs)
    steps = args.max_steps
    if steps <= 0:
        try:
            rows = len(trainer.train_dataset)
        except TypeError:  # streamed: its end is not known
            return 1
        steps = math.ceil(rows / args.train_batch_size / row_processes(args) / args.gradient_accumulation_steps)
        steps = math.ceil(steps * args.num_train_epochs)
    every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * steps))
    return math.ceil((steps - trainer.state.global_step) / every) if args.save_strategy == "steps" else 1


def check_room(output: Path, needed: int, args: TrainingArguments) -> None:
    """Raises OSError where the disk of `output` has less room than a run takes."""
    free = shutil.disk_usage(output).free
    if needed > free:
        raise OSError(
            f"The run writes about {needed / 1e9:.2f} GB to output_dir {output}, but its disk has {free / 1e9:.2f} GB "
            "free: give another --output_dir, or keep fewer checkpoints (--save_total_limit 1, --save_only_model "
            "true, or --save_strategy no)."
        )


# ---- weights first ----


def keep_weights(trainer: Trainer, folder: str | Path, state: dict | None, error: Exception) -> None:
    """After `folder` could not be saved: the weights alone to a folder beside it. Raises OSError that says where.

    They are in the names that they have in memory, which `from_pretrained` reads beside the source's config.
    """
    reason = " ".join(str(error).split()) or type(error).__name__
    kept = Path(trainer.args.output_dir) / f"weights-{trainer.state.global_step}"
    if "No space left" in reason:  # of a full disk: what was cut short is in the way
        for path in Path(folder).glob("*.safetensors"):
            path.unlink()
    try:
        kept.mkdir(parents=True, exist_ok=True)
        if chosen_experts(trainer.moe):
            save_rows(trainer.moe, kept, state)
        elif trainer.model is not trainer.moe:
            from peft import get_peft_model_state_dict

            save_file(get_peft_model_state_dict(trainer.model, state), kept / ADAPTER_FILE)
        else:
            save_torch_state_dict(trainer.model.state_dict() if state is None else state, kept)
    except Exception as second:  # a full disk, or weights that no process has whole
        shutil.rmtree(kept, ignore_errors=True)
        last = last_checkpoint(trainer.args.output_dir) or "not there"
        raise OSError(
            f"{folder} could not be saved: {reason}; nor could the weights alone: {' '.join(str(second).split())}. "
            f"The last complete checkpoint is {last}."
        ) from error
    raise OSError(f"{folder} could not be saved: {reason}. The weights alone are in {kept}.") from error


@contextmanager
def after_saving(trainer: Trainer) -> Iterator[None]:
    """For what comes after the weights are saved: where it fails, one line says that they are there."""
    try:
        yield
    except Exception as error:
        said = f"The trained weights are saved to {trainer.args.output_dir}, but what comes after them failed"
        if isinstance(error, (ValueError, OSError)):
            kind = OSError if isinstance(error, OSError) else ValueError
            raise kind(f"{said}: {' '.join(str(error).split())}") from error
        print(f"{said}:", file=sys.stderr)
        raise
