"""Supervised fine-tuning: `hf-moe train RECIPE.yaml [--key value ...]`, with TRL's SFTTrainer underneath."""

import shutil
import sys
from itertools import islice
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME

import hf_moe  # noqa: F401  (the Auto classes learn "hf_moe")

from .adapters import AdapterArguments, add_adapter, check_adapter_arguments
from .arguments import DataArguments, ModelArguments, parse_sft
from .checkpoints import is_complete, last_checkpoint, load_model
from .data import is_conversational, load_rows
from .esft import EsftArguments, check_esft_arguments, merge_rows, specialise
from .merging import merge_adapter
from .parameter_groups import GROUPS, train_group
from .sft_trainer import MoeSFTConfig, MoeSFTTrainer

NO_ADAPTER, NO_ESFT = AdapterArguments(), EsftArguments()
TEMPLATES = Path(__file__).parent / "templates"
LAST = ("config.json", "adapter_config.json")  # a folder without them does not load
MERGE_BATCHES = 8  # enough to count routes


def main(argv: list[str]) -> None:
    """Run the recipe argv[0] with the arguments after it. Raises ValueError or OSError for the user's mistakes."""
    run(*parse_sft(argv))


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: MoeSFTConfig,
    adapter_args: AdapterArguments = NO_ADAPTER,
    esft_args: EsftArguments = NO_ESFT,
) -> dict[str, float]:
    """Train, evaluate before and after, save to `output_dir`; returns the metrics, with `eval_loss_before`."""
    check_adapter_arguments(adapter_args, model_args.trainable)
    check_esft_arguments(esft_args, other_choices(model_args, adapter_args))
    checkpoint = checkpoint_to_resume(args)
    args.chat_template_path = find_template(args.chat_template_path)
    train_rows, eval_rows = load_data(data_args, args)
    args.eval_on_start = eval_rows is not None and checkpoint is None
    source = checkpoint or model_args.model_name_or_path
    tokenizer = load_tokenizer(source, model_args, args)
    check_template(tokenizer, train_rows, args)

    done = steps_done(checkpoint)
    if checkpoint is not None:
        print(f"resuming from {checkpoint}, after {done} steps", file=sys.stderr)
    # A checkpoint of an adapter, or of some experts, does not hold the model.
    whole = adapter_args.lora_parts is None and esft_args.esft_p is None
    weights = source if whole else model_args.model_name_or_path
    if esft_args.esft_p is not None:
        keep_selection_bias(args)
    trainer = build_trainer(weights, model_args, args, adapter_args, tokenizer, train_rows, eval_rows)
    if esft_args.esft_p is not None:
        print(specialise(trainer, esft_args, checkpoint), file=sys.stderr)
    result = trainer.train(resume_from_checkpoint=checkpoint)
    metrics = result.metrics if result.global_step > done else {}
    if metrics:
        trainer.save_metrics("train", metrics)
    if eval_rows is not None:
        before = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
        after = trainer.evaluate() | {"eval_loss_before": before}
        trainer.save_metrics("eval", after)
        metrics = metrics | after
    save(trainer)
    if adapter_args.lora_merge is not None:
        metrics = metrics | save_merged(trainer, adapter_args.lora_merge)
    if esft_args.esft_merge:
        merge_rows(trainer.moe)
        write_merged(trainer, trainer.moe)
    if trainer.is_world_process_zero():
        print(summary(metrics, args.output_dir), file=sys.stderr)
    return metrics


def checkpoint_to_resume(args: MoeSFTConfig) -> str | None:
    """The checkpoint that `resume_from_checkpoint` means, a folder or true for the last one; else None.

    Raises ValueError if there is none, or if `output_dir` holds something that this run would overwrite.
    """
    wanted, output = args.resume_from_checkpoint, Path(args.output_dir)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir {output} is a file.")
    if wanted is None or wanted.lower() in ("false", "no"):
        if output.exists() and any(output.iterdir()):
            raise ValueError(
                f"output_dir {output} is not empty: give another, or --resume_from_checkpoint true to continue it."
            )
        return None
    if wanted.lower() in ("true", "yes"):
        checkpoint = last_checkpoint(output)
        if checkpoint is None:
            raise ValueError(f"output_dir {output} holds no complete checkpoint to resume from.")
        return checkpoint
    if not is_complete(wanted):
        raise ValueError(f"resume_from_checkpoint {wanted} is not a complete checkpoint.")
    return wanted


def steps_done(checkpoint: str | None) -> int:
    """How many optimizer steps a checkpoint has behind it."""
    return 0 if checkpoint is None else TrainerState.load_from_json(f"{checkpoint}/{TRAINER_STATE_NAME}").global_step


def load_data(data_args: DataArguments, args: MoeSFTConfig) -> tuple[Dataset, Dataset | None]:
    common = {"config": data_args.dataset_config, "text_field": args.dataset_text_field}
    train_rows = load_rows(data_args.train_data, split=data_args.train_split, what="train_data", **common)
    if data_args.eval_data:
        return train_rows, load_rows(data_args.eval_data, split=data_args.eval_split, what="eval_data", **common)
    if args.eval_strategy != "no":
        raise ValueError(f"eval_strategy is {args.eval_strategy.value}: give --eval_data, or --eval_strategy no.")
    return train_rows, None


def load_tokenizer(source: str, model_args: ModelArguments, args: MoeSFTConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model. Raises FileNotFoundError for an absent folder, ValueError if nothing loads."""
    path = Path(source)
    if not path.is_dir() and (path.is_absolute() or source.startswith(".") or source.count("/") > 1):
        raise FileNotFoundError(f"model_name_or_path: there is no folder {source}.")
    try:
        return AutoTokenizer.from_pretrained(
            source, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model_name_or_path {source} has no tokenizer that loads: {reason}") from error


def shipped_templates() -> dict[str, str]:
    """The chat templates that come with hf_moe: name to file."""
    return {path.stem: str(path) for path in sorted(TEMPLATES.glob("*.jinja"))}


def find_template(name: str | None) -> str | None:
    """The file of a shipped template by its name; a file, a folder or a Hub tokenizer's name as it is, for TRL."""
    if name is None or Path(name).exists():
        return name
    path = shipped_templates().get(name, name)
    if path == name and ("/" not in name or name.endswith((".jinja", ".j2"))):
        raise FileNotFoundError(
            f"chat_template_path: there is no file {name}; the templates that come along are "
            f"{', '.join(shipped_templates())}."
        )
    return path


def check_template(tokenizer: PreTrainedTokenizerBase, rows: Dataset, args: MoeSFTConfig) -> None:
    if is_conversational(rows) and args.chat_template_path is None and tokenizer.chat_template is None:
        raise ValueError(
            "The rows are conversations and the tokenizer has no chat template: give --chat_template_path FILE.jinja, "
            f"or one of {', '.join(shipped_templates())}."
        )


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
    named = {
        "attn_implementation": model_args.attn_implementation,
        "experts_implementation": model_args.experts_implementation,
    }
    model = load_model(
        source,
        dtype=model_args.dtype,
        revision=model_args.model_revision,
        trust_remote_code=args.trust_remote_code,
        **{name: value for name, value in named.items() if value is not None},
        **(args.model_init_kwargs or {}),
    )
    args.model_init_kwargs = None  # used
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


def other_choices(model_args: ModelArguments, adapter_args: AdapterArguments) -> dict[str, object]:
    """The given arguments beside esft_p that say what trains."""
    given = {} if model_args.trainable == "all" else {"trainable": model_args.trainable}
    return given if adapter_args.lora_parts is None else given | {"lora_parts": adapter_args.lora_parts}


def keep_selection_bias(args: MoeSFTConfig) -> None:
    """Where the router is frozen, so is its selection bias, which is as much of its choice as its weights.

    Only a speed among the arguments moves it, not the one of the configuration.
    """
    if args.router_bias_update_speed is None:
        args.router_bias_update_speed = 0.0


def choose_trained(model: PreTrainedModel, group: str, args: MoeSFTConfig) -> None:
    """Freeze what `group` leaves out, and say what trains."""
    print(train_group(model, group), file=sys.stderr)
    if "router" not in GROUPS[group]:
        keep_selection_bias(args)


def check_kept(name: str, given: Dataset | None, kept: Dataset | None, args: MoeSFTConfig) -> None:
    """Say how many rows TRL left out because truncation left nothing to learn from; raises ValueError if all."""
    if given is None or args.packing:  # packed rows are other rows
        return
    if len(kept) == 0:
        raise ValueError(f"{name} has no token to learn from within max_length {args.max_length}.")
    if len(kept) < len(given):
        lost = f"{len(given) - len(kept)} of {len(given)} rows"
        print(f"{name}: {lost} have no token to learn from within max_length {args.max_length}", file=sys.stderr)


def save(trainer: MoeSFTTrainer) -> None:
    """Model and tokenizer to `output_dir`, the configuration last: a kill leaves no folder that half loads."""
    output = Path(trainer.args.output_dir)
    aside = output / ".incomplete"
    if trainer.args.should_save:
        shutil.rmtree(aside, ignore_errors=True)
    trainer.model.config.use_cache = True  # the Trainer turned it off for training, and would save that
    trainer.save_model(str(aside), _internal_call=True)
    if trainer.args.should_save:
        (aside / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, and nothing that the recipe does not say
        for path in sorted(aside.iterdir(), key=lambda path: path.name in LAST):
            path.replace(output / path.name)
        aside.rmdir()
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def save_merged(trainer: MoeSFTTrainer, dtype: str) -> dict[str, float]:
    """The model with its adapter merged to `output_dir`/merged; returns the share of routes that this changed.

    The routes are those of the first held-out batches, or of training ones where there are none, without autocast.
    """
    held_out = trainer.eval_dataset is not None
    loader = trainer.get_eval_dataloader() if held_out else trainer.get_train_dataloader()
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    merged, changed, total = merge_adapter(model, getattr(torch, dtype), list(islice(loader, MERGE_BATCHES)))
    write_merged(trainer, merged)
    if trainer.is_world_process_zero():
        print(f"merged in {dtype}: {changed} of {total} routes changed", file=sys.stderr)
    metrics = {"merge_changed_routes": changed / total}
    trainer.save_metrics("merge", metrics)
    return metrics


def write_merged(trainer: MoeSFTTrainer, model: PreTrainedModel) -> None:
    """A whole model and its tokenizer to `output_dir`/merged, in place of what was there."""
    if trainer.args.should_save:
        output = Path(trainer.args.output_dir) / "merged"
        aside = output.with_name(".merged")
        shutil.rmtree(aside, ignore_errors=True)
        model.save_pretrained(aside)
        trainer.processing_class.save_pretrained(aside)
        shutil.rmtree(output, ignore_errors=True)
        aside.rename(output)


def summary(metrics: dict[str, float], output_dir: str) -> str:
    loss = f"train loss {metrics['train_loss']:.4f}" if "train_loss" in metrics else "no step was left to train"
    if "eval_loss" in metrics:
        loss = f"held-out loss {metrics['eval_loss_before']:.4f} before, {metrics['eval_loss']:.4f} after"
    return f"{loss}; saved to {output_dir}"
