"""One arm with one seed, trained and measured, in a process of its own."""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from datasets import Dataset
from hf_moe.training.balance.metrics import split
from hf_moe.training.balance.moe_arguments import MoeTrainingArguments
from hf_moe.training.trainers.trainer import MoeTrainer
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, default_data_collator, set_seed
from transformers.utils.logging import disable_progress_bar

from hf_moe.model.configuration_hf_moe import HfMoeConfig
from hf_moe.model.modeling_hf_moe import HfMoeForCausalLM
from hf_moe.plugins import load_plugin
from hf_moe.sizes.counts import sizes
from hf_moe.version import __version__

from .experiment import Arm, Budget
from .text import IDS, Text

# Name in a run -> name among the trainer's metrics on held-out text.
MEASURES = {
    "held_out_loss": "eval_loss",
    "dead_experts": "eval_router_dead_experts",
    "max_violation": "eval_router_max_violation",
    "load_entropy": "eval_router_load_entropy",
    "experts_per_token": "eval_router_experts_per_token",
    "router_logits": "eval_z_loss",  # mean squared logsumexp
}
SEEN = 40  # times in a run that each expert's share of the tokens is kept
ON_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Job:
    """text: the folder of a saved Text; plugins: files that register routers, for processes that know none of them."""

    arm: str
    seed: int
    what: Arm
    budget: Budget
    text: Path
    measure: Callable | None = None
    plugins: tuple[str, ...] = ()


class Start(NamedTuple):
    """What is trained, and on which text."""

    model: PreTrainedModel
    text: Text


class Watch(TrainerCallback):
    """Seconds of each step, and every now and then the share of each expert in the last layer's tokens."""

    def __init__(self):
        self.seconds, self.shares, self.trainer = [], [], None

    def on_step_begin(self, args, state, control, **kwargs):
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if ON_GPU:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.begun)
        experts, logged = self.trainer.experts[True], self.trainer.logged
        if experts and logged and state.global_step % max(1, state.max_steps // SEEN) == 0:
            *_, (_, counts) = split(logged[-1], list(experts.values()), len(self.trainer.balance.coefficients))
            shares = (counts / counts.sum().clamp_min(1)).tolist()
            self.shares.append([state.global_step, *(round(x, 4) for x in shares)])


class Trial:
    """An arm with a seed: its text, and how models are made and trained there.

    All arms with a seed see the same rows in the same order.
    """

    def __init__(self, job: Job):
        self.arm, self.budget, self.seed, self.folder = job.what, job.budget, job.seed, job.text

    @cached_property
    def text(self) -> Text:
        return Text.load(self.folder)

    def model(self, **fields: Any) -> HfMoeForCausalLM:
        """Of random weights, which are the seed's."""
        set_seed(self.seed)
        return HfMoeForCausalLM(config_of(self.arm.fields | fields, self.budget))

    def watched(self, model: PreTrainedModel, text: Text, output: str, **arguments: Any) -> Watch:
        """A trainer, with what watches it."""
        if ON_GPU and hasattr(model.config, "router_type"):
            model.set_experts_implementation("auto")
        steps = arguments.get("max_steps", self.budget.steps)
        settings = {
            "output_dir": output,
            "max_steps": steps,
            "per_device_train_batch_size": self.budget.rows,
            "per_device_eval_batch_size": self.budget.rows,
            "learning_rate": self.budget.learning_rate,
            "lr_scheduler_type": "cosine",
            "warmup_steps": steps // 10,
            "weight_decay": 0.1,
            "adam_beta2": 0.95,
            "seed": self.seed,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": ON_GPU,
            "use_cpu": not ON_GPU,
        }
        rows, held_out = (
            Dataset.from_dict({"input_ids": x, "labels": x}).with_format("torch") for x in (text.rows, text.held_out)
        )
        watch = Watch()
        trainer = watch.trainer = MoeTrainer(
            model=model,
            args=MoeTrainingArguments(**settings | arguments),
            train_dataset=rows,
            eval_dataset=held_out,
            data_collator=default_data_collator,
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        return watch

    def fit(self, model: PreTrainedModel, text: Text, **arguments: Any) -> None:
        """Train it, as what an arm begins with."""
        with tempfile.TemporaryDirectory() as output:
            self.watched(model, text, output, **arguments).trainer.train()

    def measured(self, model: PreTrainedModel, text: Text, **arguments: Any) -> dict[str, Any]:
        """Train it; what was measured."""
        with tempfile.TemporaryDirectory() as output:
            watch = self.watched(model, text, output, **arguments)
            trainer = watch.trainer
            found = {"loss_at_start": trainer.evaluate()["eval_loss"]}
            trainer.train()
            metrics = trainer.evaluate()
        found |= {name: metrics[key] for name, key in MEASURES.items() if key in metrics}
        found["step_ms"] = 1000 * statistics.median(watch.seconds)
        found["losses"] = [round(x["loss"], 4) for x in trainer.state.log_history if "loss" in x]
        return found | ({"shares": watch.shares} if watch.shares else {})


def config_of(fields: dict[str, Any], budget: Budget) -> HfMoeConfig:
    """The model of these fields. Raises ValueError where they do not go together."""
    given = {"vocab_size": budget.vocabulary, "max_position_embeddings": budget.length, **IDS}
    return HfMoeConfig(**given | budget.fields | fields)


def size_of(arm: Arm, budget: Budget) -> dict[str, int]:
    """Parameters, active ones, FLOPs of a token and of the whole training, and bytes that a token's cache takes."""
    said = sizes(config_of(arm.fields, budget), budget.length)
    names = ("total_params", "active_params", "flops_per_token", "kv_cache_bytes_per_token")
    tokens = arm.arguments.get("max_steps", budget.steps) * budget.rows * budget.length
    return {name: said[name] for name in names} | {"training_flops": said["training_flops_per_token"] * tokens}


def random_weights(trial: Trial) -> Start:
    return Start(trial.model(), trial.text)


def train(job: Job) -> dict[str, Any]:
    """What the arm measures."""
    for plugin in job.plugins:
        load_plugin(plugin)
    torch.set_num_threads(1)
    disable_progress_bar()
    trial = Trial(job)
    start = (job.what.begin or random_weights)(trial)
    set_seed(job.seed)
    found = trial.measured(*start, **job.what.arguments)
    if job.measure is not None:
        found |= job.measure(trial, start.model)
    return {"arm": job.arm, "seed": job.seed, **found, "versions": versions()}


def versions() -> dict[str, str]:
    card = torch.cuda.get_device_name() if ON_GPU else "CPU"
    return {
        "hf_moe": __version__,
        "torch": torch.__version__,
        "Transformers": transformers.__version__,
        "device": card,
    }
