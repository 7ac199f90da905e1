"""Tiny models trained over the stages of a pipeline, or in one process: what each finds, to be compared.

Run by torchrun it writes what each case in argv[2:] finds to the folder argv[1].
"""

import json
import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from hf_moe.training.trainers.pipeline.gathering import on_first
from hf_moe.training.trainers.pipeline.trainer import trainer_for
from hf_moe.training.trainers.sft_trainer import MoeSFTConfig
from hf_moe.training.weights.groups import train_group
from safetensors.torch import save_file
from transformers import AutoTokenizer

from hf_moe.demo import DEMO_MODEL
from tests.processes import leave
from tests.training.balance_worker import COEFFICIENTS, Gradient
from tests.training.models import BIASED, deepseek_v3, hf_moe, olmoe, rows

FOUR = {"num_hidden_layers": 4}
ROUTING = {**COEFFICIENTS, "router_bias_update_speed": 1e-2}
MTP = {"num_mtp_layers": 2, "mtp_loss_coef": 0.5}
PLAIN = {"router_aux_loss_coef": 3.0, "router_z_loss_coef": 0.3}

QUANTILE = {"router_bias_update": "quantile", "router_bias_update_speed": 0.5}
LAST_STEP = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 3}  # of three micro-batches
ONE_GROUP = {"n_group": 1, "topk_group": 1}


def routers_alone():
    model = hf_moe(**FOUR)
    train_group(model, "router_only")
    return model


# Name -> model, and the arguments of its run.
CASES = {
    "hf_moe": (lambda: hf_moe(**FOUR, **BIASED), ROUTING),
    "rows": (lambda: hf_moe(**FOUR, **BIASED), ROUTING),
    "mtp": (lambda: hf_moe(**FOUR, **BIASED, **MTP), ROUTING),
    "mtp_off": (lambda: hf_moe(**FOUR, num_mtp_layers=1, mtp_loss_coef=0.0), PLAIN),
    "tokens": (lambda: hf_moe(**FOUR), {"router_z_loss_coef": 0.3, "seq_aux_loss_coef": 3.0}),
    "frozen": (routers_alone, PLAIN),
    "tied": (lambda: hf_moe(**FOUR, tie_word_embeddings=True, embedding_multiplier=3.0), PLAIN),
    "micro_batch": (lambda: hf_moe(**FOUR), PLAIN | {"balance_over": "micro_batch", "log_each_router": True}),
    "checkpointed": (lambda: hf_moe(**FOUR), PLAIN | {"gradient_checkpointing": True}),
    "selective": (lambda: hf_moe(**FOUR), PLAIN | {"gradient_checkpointing": "selective"}),
    "quantile": (lambda: hf_moe(**FOUR, **ONE_GROUP, **BIASED), QUANTILE),
    "threshold": (lambda: hf_moe(**FOUR, router_type="expert_threshold"), PLAIN),
    "short": (lambda: hf_moe(**FOUR), PLAIN | LAST_STEP),
    "dense": (lambda: hf_moe(**FOUR, **ONE_GROUP, mlp_layer_types=["dense"] * 4), {}),
    "olmoe": (lambda: olmoe(**FOUR), PLAIN),
    "deepseek_v3": (lambda: deepseek_v3(**FOUR), {"router_bias_update_speed": 1e-2, "router_aux_loss_coef": 3.0}),
}


class First(Gradient):
    """The gradient of the first step: later ones follow from steps that Adam divides by small numbers."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 0:
            super().on_pre_optimizer_step(args, state, control, **kwargs)


def run(name: str, schedule: str, size: int, folder: Path, resume: str | None = None, processes: int = 1, **changes):
    """The trainer, and the gradient of its first step, of the weights here."""
    build, arguments = CASES[name]
    gradient = First()
    gradient.value = None
    args = MoeSFTConfig(
        output_dir=str(folder),
        **{
            "max_steps": 2,
            "per_device_train_batch_size": 2 * size // processes,
            "per_device_eval_batch_size": 3,
            "gradient_accumulation_steps": 4,
            "max_grad_norm": 1.0,
            "learning_rate": 1e-3,  # what Adam makes of the rounding of small gradients stays small
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 1,
            "save_steps": 1,
            "shuffle_dataset": False,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            "gradient_checkpointing": False,
            "max_length": 64,
        }
        | arguments
        | changes,
    )
    args.pipeline_parallel_size, args.pipeline_schedule = size, schedule
    trainer = trainer_for(args)(
        model=build(),
        args=args,
        processing_class=AutoTokenizer.from_pretrained(DEMO_MODEL),
        train_dataset=Dataset.from_list(rows(32)),
        eval_dataset=Dataset.from_list(rows(7, seed=1)),
        callbacks=[gradient],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))
    return trainer, gradient.value


TIMES = ("runtime", "per_second", "time")  # ends of what is logged and no two runs have alike


def found(trainer) -> dict:
    history = [
        {name: x for name, x in entry.items() if not name.endswith(TIMES)} for entry in trainer.state.log_history[:-1]
    ]
    return {"history": history, "biases": {name: x.tolist() for name, x in trainer.present_biases().items()}}


def main(folder: str, *words: str):
    """Each word is CASE:SCHEDULE:SIZE, and @RUN after it where it goes on from the first step of another's run."""
    processes = int(os.environ["WORLD_SIZE"])
    for word in words:
        name, schedule, size = word.partition("@")[0].split(":")
        place, _, other = word.replace(":", "-").partition("@")
        place = Path(folder) / (f"{place}-resumed" if other else place)
        resume = str(Path(folder) / other / "checkpoint-1") if other else None
        trainer, gradient = run(name, schedule, int(size), place, resume, processes)
        gradient = on_first(gradient or {}, trainer.pipeline.stages, torch.device("cpu"))
        every = [None] * processes
        torch.distributed.all_gather_object(every, found(trainer))
        if torch.distributed.get_rank() == 0:
            save_file(gradient, place / "gradient.safetensors")
            (place / "found.json").write_text(json.dumps(every))
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
