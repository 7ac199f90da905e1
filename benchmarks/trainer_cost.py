"""What MoeTrainer costs beside Transformers' Trainer: metrics, balance losses, and counting a whole step ahead.

    python benchmarks/trainer_cost.py --out benchmarks/results/trainer_cost.json

trains the same model on random tokens with each and prints the median time of an optimizer step, log included.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from transformers import Trainer, TrainerCallback

from hf_moe import HfMoeConfig, HfMoeForCausalLM, MoeTrainer, MoeTrainingArguments
from hf_moe.version import __version__

OFF = {"router_aux_loss_coef": 0.0}
CHECKPOINTED = {"gradient_checkpointing": True}
# name -> trainer, micro-batches a step, arguments
RUNS = {
    "Trainer, no balance loss": (Trainer, 1, OFF),
    "MoeTrainer, metrics alone": (MoeTrainer, 1, OFF),
    "MoeTrainer, load-balancing loss": (MoeTrainer, 1, {"router_aux_loss_coef": 0.01}),
    "4 micro-batches: Trainer": (Trainer, 4, OFF),
    "4 micro-batches: metrics alone": (MoeTrainer, 4, OFF),
    "4 micro-batches: balanced each": (MoeTrainer, 4, {"router_aux_loss_coef": 0.01, "balance_over": "micro_batch"}),
    "4 micro-batches: balanced together": (MoeTrainer, 4, {"router_aux_loss_coef": 0.01}),
    "4 micro-batches: z-loss, sequence loss": (
        MoeTrainer,
        4,
        OFF | {"router_z_loss_coef": 1e-3, "seq_aux_loss_coef": 1e-4},
    ),
    "4 checkpointed: metrics alone": (MoeTrainer, 4, OFF | CHECKPOINTED),
    "4 checkpointed: balanced together": (MoeTrainer, 4, CHECKPOINTED | {"router_aux_loss_coef": 0.01}),
}


class Clock(TrainerCallback):
    def __init__(self):
        self.times = []

    def on_step_begin(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())


def seconds_a_step(trainer_class, micro_batches: int, arguments: dict, sizes: argparse.Namespace) -> float:
    torch.manual_seed(0)
    config = HfMoeConfig(
        vocab_size=8192,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.hidden,
        moe_intermediate_size=sizes.hidden // 2,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.hidden // 64,
        num_experts=sizes.experts,
        num_experts_per_tok=4,
        max_position_embeddings=sizes.length,
        router_aux_loss_coef=0.0,
    )
    rows = torch.randint(0, 8192, (sizes.batch * micro_batches * sizes.steps, sizes.length))
    data = [{"input_ids": row, "labels": row} for row in rows]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=HfMoeForCausalLM(config),
            args=MoeTrainingArguments(
                output_dir=folder,
                max_steps=sizes.steps,
                per_device_train_batch_size=sizes.batch,
                gradient_accumulation_steps=micro_batches,
                bf16=torch.cuda.is_available(),
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
                **arguments,
            ),
            train_dataset=data,
            callbacks=[clock],
        )
        trainer.train()
    between = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    return statistics.median(between[3:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    for name, default in {
        "hidden": 1024,
        "layers": 12,
        "experts": 32,
        "length": 1024,
        "batch": 8,
        "steps": 24,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes = parser.parse_args()
    seconds = {}
    for name, run in RUNS.items():
        seconds[name] = seconds_a_step(*run, sizes)
        print(f"{name:40s} {1000 * seconds[name]:9.1f} ms", flush=True)
    if sizes.out:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
        setting = {name: value for name, value in vars(sizes).items() if name != "out"}
        versions = {"hf_moe": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        report = {"device": device, "versions": versions, "setting": setting, "milliseconds_a_step": seconds}
        report["milliseconds_a_step"] = {name: round(1000 * value, 2) for name, value in seconds.items()}
        sizes.out.parent.mkdir(parents=True, exist_ok=True)
        sizes.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
