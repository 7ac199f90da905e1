"""One arm with one seed, trained and measured, in a process of its own."""

import statistics
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from hf_moe.training.balance.moe_arguments import MoeTrainingArguments
from hf_moe.training.trainers.trainer import MoeTrainer
from transformers import PrinterCallback, TrainerCallback, default_data_collator, set_seed

from hf_moe.model.configuration_hf_moe import HfMoeConfig
from hf_moe.model.modeling_hf_moe import HfMoeForCausalLM
from hf_moe.plugins import load_plugin
from hf_moe.sizes.counts import sizes

from .data import rows_of, tokenizer
from .experiment import Arm, Budget

# Name in a run -> name among the trainer's metrics on held-out text.
MEASURES = {
    "held_out_loss": "eval_loss",
    "dead_experts": "eval_router_dead_experts",
    "max_violation": "eval_router_max_violation",
    "load_entropy": "eval_router_load_entropy",
    "experts_per_token": "eval_router_experts_per_token",
    "router_logits": "eval_z_loss",  # mean squared logsumexp
}


@dataclass(frozen=True)
class Job:
    """plugins: files that register routers, for processes that know none of them."""

    arm: str
    seed: int
    what: Arm
    budget: Budget
    data: str | None
    plugins: tuple[str, ...] = ()


class Watch(TrainerCallback):
    """Seconds of each step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begun)


def config_of(arm: Arm, budget: Budget) -> HfMoeConfig:
    """The arm's model. Raises ValueError where its fields do not go together."""
    ids = {name: getattr(tokenizer(), name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    given = {"vocab_size": len(tokenizer()), "max_position_embeddings": budget.length, **ids}
    return HfMoeConfig(**given | budget.fields | arm.fields)


def size_of(arm: Arm, budget: Budget) -> dict[str, int]:
    """Parameters, active ones, and FLOPs of a token."""
    said = sizes(config_of(arm, budget), budget.length)
    return {name: said[name] for name in ("total_params", "active_params", "flops_per_token")}


def train(job: Job) -> dict[str, Any]:
    """What the arm measures. All arms with a seed see the same rows in the same order."""
    for plugin in job.plugins:
        load_plugin(plugin)
    torch.set_num_threads(1)
    rows, held_out = (
        Dataset.from_dict({"input_ids": x, "labels": x}).with_format("torch") for x in rows_of(job.data, job.budget)
    )
    set_seed(job.seed)
    model, watch = HfMoeForCausalLM(config_of(job.what, job.budget)), Watch()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        model.set_experts_implementation("auto")
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "output_dir": folder,
            "max_steps": job.budget.steps,
            "per_device_train_batch_size": job.budget.rows,
            "per_device_eval_batch_size": job.budget.rows,
            "learning_rate": job.budget.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": job.budget.steps // 10,
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
            "seed": job.seed,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": on_gpu,
            "use_cpu": not on_gpu,
        }
        trainer = MoeTrainer(
            model=model,
            args=MoeTrainingArguments(**arguments | job.what.arguments),
            train_dataset=rows,
            eval_dataset=held_out,
            data_collator=default_data_collator,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        metrics = trainer.evaluate()
    found = {name: metrics[key] for name, key in MEASURES.items() if key in metrics}
    found["step_ms"] = 1000 * statistics.median(watch.seconds)
    found["losses"] = [round(x["loss"], 4) for x in trainer.state.log_history if "loss" in x]
    return {"arm": job.arm, "seed": job.seed, **found}
