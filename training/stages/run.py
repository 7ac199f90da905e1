"""What the stages of training share: resuming, data, tokenizer, model, what trains, the run itself, saving."""

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerState,
    TrainingArguments,
)

import hf_moe  # noqa: F401  (the Auto classes learn "hf_moe")
from hf_moe.chat import write_plain_templates
from hf_moe.hub import METRICS

from ..data.sources import loss_names
from ..host import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from ..output.checkpoints import check_optimizer, is_complete, last_checkpoint
from ..output.resuming import check_same_arguments, check_same_step, contents_of
from ..output.saved_dtype import cast, finish, name_of
from ..output.saving import after_saving
from ..weights.average import AVERAGE_FILE
from ..weights.esft import ROWS_FILE
from .progress import close_bar, say_in_lines

LOGS = (METRICS, "figures")  # of a run that ended before it had anything to save
LAST = ("config.json", "adapter_config.json")  # a folder without them does not load


def checkpoint_to_resume(args: TrainingArguments) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means, a folder or true for the last one; else None.

    Raises ValueError if there is none, as `check_optimizer` and `check_same_arguments`, or if `output_dir` holds
    something that this run would overwrite.
    """
    wanted, output = args.resume_from_checkpoint, Path(args.output_dir)
    args.contents = contents_of(args)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir {output} is a file: give a folder.")
    if wanted is None or wanted.lower() in ("false", "no"):
        if output.exists() and any(path.name not in LOGS for path in output.iterdir()):
            raise ValueError(
                f"output_dir {output} is not empty: give another, or --resume_from_checkpoint true to continue it."
            )
        return None
    if wanted.lower() in ("true", "yes"):
        wanted = last_checkpoint(output)
        if wanted is None:
            raise ValueError(
                f"output_dir {output} holds no complete checkpoint to resume from: leave --resume_from_checkpoint "
                "out, with an --output_dir that is new or empty, to begin anew."
            )
    elif not is_complete(wanted) or Path(wanted).resolve() == output.resolve():
        raise ValueError(
            f"resume_from_checkpoint {wanted} is not a complete checkpoint: give a folder checkpoint-STEP of a run, "
            "or true for the last one in output_dir."
        )
    check_optimizer(wanted)
    check_same_arguments(wanted, args)
    if not hasattr(args, "batch_tokens"):  # which decides what a step is once the model is known
        check_same_step(wanted, args)
    args.resumed = wanted
    return wanted


def steps_done(checkpoint: str | None) -> int:
    """How many optimizer steps a checkpoint has behind it."""
    return 0 if checkpoint is None else TrainerState.load_from_json(f"{checkpoint}/{TRAINER_STATE_NAME}").global_step


class Trained(NamedTuple):
    """What a run leaves: its trainer, with the model, and what it measured."""

    trainer: Trainer
    metrics: dict[str, float]


def train(trainer: Trainer, checkpoint: str | None, dtype: torch.dtype | None = None) -> dict[str, float]:
    """Train from `checkpoint` on, save in `dtype`, then evaluate if there are held-out rows; returns the metrics.

    They have `eval_loss_before` where the arguments say `eval_on_start`, or said so before the checkpoint.
    """
    say_in_lines(trainer)
    done = steps_done(checkpoint)
    if checkpoint is not None:
        print(f"resuming from {checkpoint}, after {done} steps", file=sys.stderr)
    trainer.final_dtype = dtype
    try:
        result = trainer.train(resume_from_checkpoint=checkpoint)
    except BaseException:
        close_bar(trainer)
        raise
    trainer.saved_dtype = dtype  # which checkpoints are not: what goes on from them has to be as exact as they were
    save(trainer)
    with after_saving(trainer):
        if getattr(trainer, "average", None) is not None:
            save_average(trainer)
        metrics = result.metrics if result.global_step > done else {}
        if metrics:
            trainer.save_metrics("train", metrics)
        if trainer.eval_dataset is not None:
            history = trainer.state.log_history
            before = {
                f"{name}_before": next(entry[name] for entry in history if name in entry)
                for name in loss_names(trainer)
            }
            after = trainer.evaluate() | before
            trainer.save_metrics("eval", after)
            metrics = metrics | after
        publish(trainer)
    return metrics


def save(trainer: Trainer) -> None:
    """Model and tokenizer to `output_dir`, the configuration last: a kill leaves no folder that half loads."""
    output = Path(trainer.args.output_dir)
    aside = output / ".incomplete"
    trainer.model.config.use_cache = True  # the Trainer turned it off for training, and would save that
    save_aside(trainer, aside)
    if trainer.args.should_save:
        for path in sorted(aside.iterdir(), key=lambda path: path.name in LAST):
            path.replace(output / path.name)
        aside.rmdir()
    # Under FSDP2 the others send their shards and do not wait until the first has them: one that ended here would
    # leave it waiting for good.
    trainer.accelerator.wait_for_everyone()


def publish(trainer: Trainer) -> None:
    """The run's log and the model's card to `output_dir`, and all of it to the Hub if the arguments say so."""
    trainer.save_state()
    trainer.create_model_card()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
        if trainer.args.should_save:
            (Path(trainer.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # which pushing saved anew


def save_aside(trainer: Trainer, aside: Path) -> None:
    """What the trainer saves of its model to the folder `aside`, less what only a checkpoint needs."""
    if trainer.args.should_save:
        shutil.rmtree(aside, ignore_errors=True)
    trainer.save_model(str(aside), _internal_call=True)
    if trainer.args.should_save:
        for name in (TRAINING_ARGS_NAME, AVERAGE_FILE):  # the first a pickle, and nothing that the recipe does not say
            (aside / name).unlink(missing_ok=True)


def save_average(trainer: Trainer) -> None:
    """The model with the average of its weights to `output_dir`/ema, in place of what was there."""
    output = Path(trainer.args.output_dir) / "ema"
    aside = output.with_name(".ema")
    with trainer.average.in_place_of_weights(trainer.trained_model):
        save_aside(trainer, aside)
    if trainer.args.should_save:
        replace_folder(aside, output)


def replace_folder(aside: Path, output: Path) -> None:
    shutil.rmtree(output, ignore_errors=True)
    aside.rename(output)


def write_merged(trainer: Trainer, model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
    """A whole model, in `dtype`, and its tokenizer to `output_dir`/merged, in place of what was there."""
    if trainer.args.should_save:
        output = Path(trainer.args.output_dir) / "merged"
        aside = output.with_name(".merged")
        shutil.rmtree(aside, ignore_errors=True)
        if dtype is None:
            model.save_pretrained(aside)
        else:
            model.save_pretrained(aside, state_dict=cast(model.state_dict(), dtype, model))
            finish(aside, dtype)
        trainer.processing_class.save_pretrained(aside)
        write_plain_templates(aside)
        trainer.save_record(aside)
        replace_folder(aside, output)


def say_summary(trainer: Trainer, metrics: dict[str, float]) -> None:
    """One line, by one process."""
    loss = f"train loss {metrics['train_loss']:.4f}" if "train_loss" in metrics else "no step was left to train"
    if trainer.eval_dataset is not None:
        loss = ", ".join(
            f"{said} {metrics[f'{name}_before']:.4f} before, {metrics[name]:.4f} after"
            for name, said in loss_names(trainer).items()
        )
    if trainer.is_world_process_zero():
        print(f"{loss}; {say_saved(trainer)}", file=sys.stderr)


def say_saved(trainer: Trainer) -> str:
    """What lies in `output_dir`, and in which type."""
    output = Path(trainer.args.output_dir)
    rows = (output / ROWS_FILE).is_file()
    what = "adapter" if trainer.model is not trainer.moe else "rows of the trained experts" if rows else "model"
    said = f"{what} saved to {output}"
    if what == "model":
        said += f" in {name_of(trainer.saved_dtype or trainer.moe.dtype)}"
    parts = {"merged": "the whole model", "ema": "the average of its weights"}
    return said + "".join(f", {part} to {output / name}" for name, part in parts.items() if (output / name).is_dir())
