"""What a run was told, beside each of its checkpoints: a run that goes on from one is told where it says otherwise.

What lies in the state of the optimizer, the schedule, the random numbers or the place in the data is the checkpoint's,
whatever the arguments say, and so has to be given as it was. All else is as the new run says.
"""

import hashlib
import json
import sys
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_moe.hub import RUN_FILE as FILE
from hf_moe.staging import written_aside

from ..balance.moe_arguments import row_processes

# Arguments that have to be as they were, beside the learning rate and the rows of a step.
KEPT = (
    *("stage", "from_scratch", "model_revision", "model_init_kwargs", "router_type", "router_args", "trainable"),
    "ema_decay",
    *("float8", "fp8"),
    *("lora_parts", "lora_r", "lora_alpha", "lora_dropout", "lora_base", "esft_p", "esft_score"),
    *("optim", "optim_args", "optim_target_modules", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "lr_milestones", "lr_gamma"),
    *("seed", "data_seed", "train_weights", "dataset_config", "train_split", "dataset_text_field", "eos_token"),
    *("max_length", "on_long_rows", "truncation_mode", "packing", "packing_strategy", "shuffle_dataset"),
    *("train_sampling_strategy", "length_column_name", "dataloader_drop_last", "accelerator_config"),
    *("assistant_only_loss", "completion_only_loss"),
    *("num_generations", "steps_per_generation", "generation_batch_size", "num_iterations"),
)
# Those that name a folder or a file, whose contents have to be as they were.
CONTENTS = ("model_name_or_path", "teacher_model_name_or_path", "chat_template_path")
# What is compared by what it leads to: by contents, by rows, by the step; and where a run is, which is its own affair.
ELSEWHERE = (*CONTENTS, "train_data", "eval_data", "learning_rate", "given")
BLOCK = 1 << 16  # bytes
PLACES = ("output_dir", "resume_from_checkpoint", "run_name", "logging_dir", "local_rank", "eval_on_start")


def arguments_of(args: TrainingArguments) -> dict[str, Any]:
    """All arguments of a run as JSON holds them, without tokens: of a recipe, or else the trainer's alone."""
    said = getattr(args, "said", None) or args.to_dict()
    said = {name: value for name, value in said.items() if not name.endswith("_token") or name in KEPT}
    return json.loads(json.dumps(said, default=lambda x: x.value if isinstance(x, Enum) else str(x)))


def step_of(args: TrainingArguments) -> dict[str, Any]:
    """What a step is, as all arguments together make it."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * row_processes(args)
    return {"learning_rate": args.learning_rate, "rows a step": rows}


def contents_of(args: TrainingArguments) -> dict[str, str]:
    """Of each argument that names a folder or a file, a digest of what is in it; of a name of the Hub, itself."""
    said = getattr(args, "said", {})
    return {name: content(said[name]) for name in CONTENTS if said.get(name) is not None}


def content(name: str) -> str:
    path = Path(name)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors")) or [path / "config.json"]
    if not files[0].is_file():
        return name
    found = hashlib.blake2b(digest_size=16)
    for file in files:  # of large ones the beginning, the middle and the end
        size = file.stat().st_size
        found.update(f"{size} ".encode())
        with file.open("rb") as opened:
            for place in (0, size // 2, max(0, size - BLOCK)):
                opened.seek(place)
                found.update(opened.read(BLOCK))
    return found.hexdigest()


def write_arguments(args: TrainingArguments, folder: str | Path) -> None:
    """What this run was told, to `folder`."""
    facts = {"arguments": arguments_of(args), "step": step_of(args)}
    facts |= {name: getattr(args, name, {}) for name in ("contents", "rows")}
    with written_aside(Path(folder) / FILE) as aside:
        aside.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def read_arguments(folder: str | Path) -> dict[str, Any]:
    """What `write_arguments` wrote, or nothing. Raises a ValueError that names a damaged file."""
    path = Path(folder) / FILE
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def check_same_arguments(checkpoint: str, args: TrainingArguments) -> None:
    """Raises ValueError where the run of the checkpoint was told otherwise, in what only its state decides."""
    before, now = read_arguments(checkpoint), arguments_of(args)
    then = before.get("arguments", {})
    found = [
        f"{name} {shown(then[name])} (now {shown(now[name])})"
        for name in KEPT
        if name in then and name in now and then[name] != now[name]
    ]
    contents = before.get("contents", {})
    found += [
        f"{name} {then.get(name)} (now {now.get(name)}, which holds something else)"
        for name, value in getattr(args, "contents", {}).items()
        if name in contents and contents[name] != value
    ]
    refuse(checkpoint, found)


def check_same_step(checkpoint: str, args: TrainingArguments) -> None:
    """Raises ValueError where a step is not what it was: its learning rate is in the state, its rows in the place."""
    then, now = read_arguments(checkpoint).get("step", {}), step_of(args)
    how = "; per_device_train_batch_size x gradient_accumulation_steps x processes"
    refuse(
        checkpoint,
        [
            f"{name} {shown(then[name])} (now {shown(now[name])}{how if 'rows' in name else ''})"
            for name in now
            if name in then and then[name] != now[name]
        ],
    )


def check_same_rows(checkpoint: str, args: TrainingArguments) -> None:
    """Raises ValueError where the training rows are not those that the checkpoint has its place in; says of others."""
    then, now = read_arguments(checkpoint).get("rows", {}), args.rows
    names = [name for name in then | now if then.get(name) != now.get(name)] if then else []
    said = {name: f"{name} {in_words(then.get(name))} (now {in_words(now.get(name))})" for name in names}
    refuse(checkpoint, [text for name, text in said.items() if name.startswith("train_data")])
    for text in said.values():
        print(f"the checkpoint was evaluated on {text}: those of now count", file=sys.stderr)


def in_words(rows: dict[str, Any] | None) -> str:
    return "absent" if rows is None else f"of {rows['rows']:,} rows, digest {rows['digest'][:8]}"


def shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def refuse(checkpoint: str, found: list[str]) -> None:
    if found:
        raise ValueError(
            f"{checkpoint} is of a run with {', '.join(found)}, which its state goes on with: give it as it was, or "
            "start a new run from its weights."
        )


def say_differences(checkpoint: str, args: TrainingArguments) -> None:
    """A line with the arguments that differ from the checkpoint's and count, or that none can be compared."""
    then, now = read_arguments(checkpoint).get("arguments"), arguments_of(args)
    if then is None:
        print(
            f"{checkpoint} has no {FILE}, as those of earlier releases: its learning rate, optimizer, schedule and "
            "place in the data count, whatever the arguments say",
            file=sys.stderr,
        )
        return
    names = [name for name in now if name in then and then[name] != now[name] and name not in (*ELSEWHERE, *PLACES)]
    if names:
        said = ", ".join(f"{name} {shown(now[name])} (was {shown(then[name])})" for name in names)
        print(f"other arguments than the checkpoint's, and these count: {said}", file=sys.stderr)
