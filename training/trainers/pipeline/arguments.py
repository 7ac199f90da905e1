"""How many processes a pipeline has, and what is refused before a model is loaded."""

import os
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments

from hf_moe.reading import auto_config

from ...host import check_stages
from .schedules import SCHEDULES


@dataclass
class PipelineArguments:
    """Of the stages that train a model's own weights on next tokens."""

    pipeline_parallel_size: int = field(
        default=1,
        metadata={
            "help": "Over how many processes the layers are split, each with all rows of its pipeline; several "
            "pipelines share the rows. Start with --accelerate pipeline."
        },
    )
    pipeline_schedule: str = field(
        default="1f1b",
        metadata={
            "help": "In which order stages take micro-batches. interleaved, zbv and dualpipev give a process two.",
            "choices": list(SCHEDULES),
        },
    )


NO_PIPELINE = PipelineArguments()
# Arguments that a pipeline cannot have, and the values that they have without.
WITHOUT = {
    "expert_parallel_size": (1,),
    "float8": (False,),
    "fp8": (False,),
    "lora_parts": (None,),
    "esft_p": (None,),
    "ema_decay": (None,),
    "densemixer": (False,),
    "torch_compile": (False,),
    "fp16": (False,),
    "muon": (False,),
    "activation_offloading": (False,),
    "load_best_model_at_end": (False,),
}
SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


def check_pipeline(pipeline: PipelineArguments, args: TrainingArguments, *others: Any) -> None:
    """Raises ValueError where the run's arguments, those in `others` too, and a pipeline exclude each other.

    Before anything is loaded. `args` are told the size, for what counts the rows of a step.
    """
    size, name = pipeline.pipeline_parallel_size, pipeline.pipeline_schedule
    args.pipeline_parallel_size, args.pipeline_schedule = size, name
    processes = args.world_size
    if size < 1 or processes % size:
        raise ValueError(
            f"pipeline_parallel_size is {size}, which does not divide the {processes} processes of this run: start "
            "with --accelerate pipeline on as many GPUs, or a multiple."
        )
    if size == 1:
        return
    check_stages()
    for part in (args, *others):
        for argument, values in WITHOUT.items():
            if (value := getattr(part, argument, values[0])) not in values:
                raise ValueError(
                    f"{argument} is {value}, and pipeline_parallel_size {size}, which go not together: leave one out."
                )
    if any(os.environ.get(name) == "true" for name in SHARDED):
        raise ValueError(
            f"pipeline_parallel_size is {size}, and a launch file shards the weights, too: start with --accelerate "
            "pipeline."
        )


def check_micro_batches(args: TrainingArguments, decides: str) -> None:
    """Raises ValueError where the micro-batches of a step do not fill the schedule; the argument `decides` gives their
    number."""
    size, name, count = args.pipeline_parallel_size, args.pipeline_schedule, args.gradient_accumulation_steps
    schedule = SCHEDULES[name]
    if size > 1 and not schedule.fits(count, size):
        raise ValueError(
            f"pipeline_schedule is {name}, which needs {schedule.needs}, and a step has {count} micro-batches for "
            f"{size} processes: give another --{decides}, or another schedule."
        )


def check_layers(source: str, model_args: Any, args: TrainingArguments) -> None:
    """Raises ValueError where the model in `source` cannot be cut so, by its configuration."""
    size = args.pipeline_parallel_size
    if size == 1:
        return
    config = auto_config(source, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code)
    text = config.get_text_config()
    multiplier = getattr(text, "embedding_multiplier", 1)
    if multiplier not in (None, 1) and config.model_type != "hf_moe":
        raise ValueError(
            f"pipeline_parallel_size is {size}, but {config.model_type} multiplies what a stage hands on by its "
            f"embedding_multiplier, {multiplier}: hf-moe import makes an hf_moe model of it."
        )
    stages, layers = size * SCHEDULES[args.pipeline_schedule].stages, text.num_hidden_layers
    if layers % stages:
        raise ValueError(
            f"The {layers} layers do not divide into {stages} stages (pipeline_parallel_size {size}, "
            f"{args.pipeline_schedule}): give another size or schedule."
        )
