"""What a training run will cost: memory of each GPU by part, and time by what measured runs took, or by a rate.

Memory is counted on the model itself, built without weights: the same code decides what trains as in a run.
"""

import math
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..kernels.copies import copied, sent
from ..kernels.recomputation import AGAIN, SELECTIVE
from ..model.configuration_hf_moe import HfMoeConfig
from ..model.configuration_hf_moe_graft import HfMoeGraftConfig
from ..training.weights.groups import train_group
from .activations import activation_bytes
from .counts import OURS, active_part, expert_flops, sizes
from .pipeline import BUBBLES, bubble_share
from .speed import RANGE, TAKEN, count, seconds

# What is cut into a share for each GPU; zero3 is FSDP2's full sharding, expert_parallel that of all but the experts.
SHARDING = {
    "none": (),
    "zero1": ("optimizer",),
    "zero2": ("gradients", "optimizer"),
    "zero3": ("weights", "gradients", "optimizer"),
    "expert_parallel": ("weights", "gradients", "optimizer"),
}
DTYPES = ("auto", "float32", "bfloat16", "float16")
# Bytes of state of a number that has `size` bytes; torch's AdamW keeps a 4-byte step a tensor, too. torchao's 8-bit
# states have a scale for 256.
STATES = {
    "adamw_torch": lambda size: 2 * size,
    "adamw_torch_fused": lambda size: 2 * size,
    "adamw_torch_8bit": lambda size: 2 * (1 + 4 / 256),
    "muon": lambda size: size,  # and as much again for the embeddings and the head
    "sgd": lambda size: 0,
}
# Stage -> what a run holds beside the trained model and its rows.
NOT_COUNTED = {
    "dpo": "the reference model, and the second answer of each row",
    "grpo": "generation: its cache, and the logits of the answers",
    "distil": "the teacher",
}
# Bytes of a number of a stored matrix, scales included (hf_moe/training/weights/quantized.py).
STORED_BYTES = {"nf4": 0.5 + (1 + 4 / 256) / 64, "fp8": 1 + 4 / 128**2, "int4": 0.5 + 4 / 128}


@dataclass(frozen=True)
class Rate:
    """FLOP/s of a GPU, where they are from, and whether what checkpointing computes again counts among them."""

    flops: float
    source: str
    counts_recomputation: bool = True


H100_PEAK = 989e12  # bfloat16, dense: NVIDIA's data sheet of the H100 SXM
MEASURED = Rate(
    269.5e12,
    "measured on an H100: one MoE layer of OLMoE-1B-7B, forward and backward, bfloat16, Transformers' grouped_mm "
    "(benchmarks/results/moe_layer.json)",
)


@dataclass(frozen=True)
class Run:
    """What is trained, and how. The names are those of recipes."""

    trainable: str = "all"
    lora_parts: list[str] | None = None
    lora_r: int = 16
    lora_base: str | None = None
    esft_p: float | None = None
    dtype: str = "float32"
    bf16: bool = True
    optim: str = "adamw_torch"
    per_device_train_batch_size: int = 1
    max_length: int = 4096
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool | str = True  # or SELECTIVE
    experts_implementation: str | None = None
    router_aux_loss_coef: float | None = None  # None: the configuration's
    ema_decay: float | None = None
    train_tokens: float | None = None
    stage: str | None = None  # None: hf_moe's MoeTrainer
    gpus: int = 1
    sharding: str = "none"
    pipeline: int | None = None  # processes, whose bubbles are reported; memory and time are those without

    @property
    def casts(self) -> bool:
        """Whether autocast casts weights, of which copies are made, or FSDP2 sends them so and keeps them whole."""
        return self.bf16 and self.lora_base is None

    @property
    def splits_experts(self) -> bool:
        return self.sharding == "expert_parallel"


def run_of_recipe(recipe: dict[str, Any], **given) -> Run:
    """The run that a recipe's arguments describe; `given` wins, and Run's default where an argument is None."""
    known = {field.name for field in fields(Run)}
    said = {name: getattr(value, "value", value) for name, value in recipe.items() if name in known}
    return Run(**{name: value for name, value in said.items() if value is not None} | given)


Config = HfMoeConfig | HfMoeGraftConfig


def plan(config: Config, run: Run, rate: Rate | None = None) -> dict[str, Any]:
    """Memory of each GPU by part in bytes, tokens a second and, of `train_tokens`, the days; as JSON can hold it.

    Without a `rate` the time is that of `hf_moe.speed`, with the range in which measured runs lay around it; of a
    graft, whose host's layers were not measured, it is left out, and time_unknown says so.

    Micro-batches that a balance loss has run ahead are held where there is room, and count nowhere.
    memory_per_gpu_total is the sum of all parts. That is the peak where gradients outlive a micro-batch, as in
    accumulation; without it they come as activations go. Raises ValueError for what contradicts itself.
    """
    check(run)
    model = model_to_train(config, run)
    parts = memory(model, config, run)
    known = [value for value in parts.values() if value is not None]
    trained = sum(x.numel() for x in model.parameters() if x.requires_grad)
    flops = flops_per_token(model, config, run)
    report = {
        "total_params": sum(x.numel() for x in model.parameters()),
        "trained_params": trained,
        "gpus": run.gpus,
        "sharding": run.sharding,
        "rows": run.per_device_train_batch_size,
        "length": run.max_length,
        "memory_per_gpu": parts,
        "memory_per_gpu_total": sum(known),
        "activations_known": len(known) == len(parts),
        "not_counted": NOT_COUNTED.get(run.stage),
        "cpu_memory_ema": 0 if run.ema_decay is None else 4 * trained,
        "flops_per_token": flops,
        **time(model, config, run, flops, rate),
    }
    if run.pipeline is not None:
        report |= {"pipeline": run.pipeline, "pipeline_bubbles": bubbles(run, flops)}
    if run.train_tokens is not None:
        report["train_tokens"] = run.train_tokens
    if run.train_tokens is not None and "tokens_per_second" in report:
        report["gpu_days"] = run.gpus * run.train_tokens / report["tokens_per_second"] / 86400
        report["days"] = report["gpu_days"] / run.gpus
    return report


def bubbles(run: Run, flops: dict[str, float] | None) -> dict[str, float] | None:
    """Schedule -> the share of a step that a process of the pipeline waits; None where the data decide.

    By FLOPs, in steps of gradient_accumulation_steps micro-batches. Backward is taken apart where no layer is computed
    again.
    """
    if flops is None:
        return None
    again = flops["recomputation"]
    weights = 0.0 if again else flops["backward"] - flops["forward"]
    given = run.pipeline, run.gradient_accumulation_steps, flops["forward"], flops["backward"] + again, weights
    return {name: bubble_share(name, *given) for name in BUBBLES}


def time(
    model: nn.Module, config: Config, run: Run, flops: dict[str, float] | None, rate: Rate | None
) -> dict[str, Any]:
    """By the rate or, without one, by what measured runs took."""
    if flops is None:
        return {"time_unknown": "the data decide about the FLOPs"}
    if rate is not None:
        return time_at(rate, run, flops)
    if isinstance(config, HfMoeGraftConfig):
        kind = config.backbone.model_type
        return {"time_unknown": f"no run of a grafted {kind} was measured; give --tflops or --mfu"}
    return measured_time(model, config, run, flops)


def time_at(rate: Rate, run: Run, flops: dict[str, float]) -> dict[str, Any]:
    done = sum(flops.values()) - (0 if rate.counts_recomputation else flops["recomputation"])
    return {
        "flops_per_second": rate.flops,
        "flops_per_second_from": rate.source,
        "tokens_per_second": run.gpus * rate.flops / done,
    }


def measured_time(model: nn.Module, config: HfMoeConfig, run: Run, flops: dict[str, float]) -> dict[str, Any]:
    """Padding counts as tokens; what GPUs send each other takes what it took two of one host."""
    step = seconds(count(model, config, run, flops))
    tokens = run.gpus * run.gradient_accumulation_steps * run.per_device_train_batch_size * run.max_length
    return {
        "seconds_per_step": step,
        "tokens_per_second": tokens / step,
        "tokens_per_second_range": [tokens / step * x for x in RANGE],
        "flops_per_second": sum(flops.values()) * tokens / step / run.gpus,
        "flops_per_second_from": "by the terms that measured runs on H100s and H200s have in common",
    }


def check(run: Run) -> None:
    """Raises ValueError for a choice that there is not, or a size below 1."""
    for name, choices in (("sharding", SHARDING), ("optim", STATES), ("dtype", DTYPES)):
        if getattr(run, name) not in choices:
            raise ValueError(f"{name} is {getattr(run, name)}; plan knows {', '.join(choices)}.")
    for name in ("gpus", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length"):
        if getattr(run, name) < 1:
            raise ValueError(f"{name} is {getattr(run, name)}; it must be at least 1.")
    if run.pipeline is not None and not 1 < run.pipeline <= run.gradient_accumulation_steps:
        raise ValueError(
            f"pipeline is {run.pipeline}, and a step has {run.gradient_accumulation_steps} micro-batches: a pipeline "
            "has 2 processes or more, and a micro-batch for each at least (--accumulation)."
        )
    if run.train_tokens is not None and not 0 < run.train_tokens < math.inf:
        raise ValueError(f"train_tokens is {run.train_tokens:g}; it must be above 0, and a number.")


def meta_model(config: Config, dtype: str) -> PreTrainedModel:
    """The model without weights; dtype auto is what the configuration says."""
    named = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
    with torch.device("meta"):
        return OURS[type(config)](deepcopy(config)).to(named)  # which is told how to compute


def model_to_train(config: Config, run: Run) -> nn.Module:
    """The model without weights, frozen where the run freezes it, with its adapter or its chosen experts."""
    model = meta_model(config, run.dtype)
    with torch.device("meta"):
        if run.lora_parts is not None:
            from ..training.host_trl import quiet
            from ..training.weights.adapters import AdapterArguments, add_adapter, check_adapter_arguments

            args = AdapterArguments(lora_parts=run.lora_parts, lora_r=run.lora_r)
            check_adapter_arguments(args, run.trainable)
            with quiet():
                return add_adapter(model, args)[0]
        if run.esft_p is not None:
            from ..routers import find_routers
            from ..training.weights.esft import split_experts

            # The fewest experts with a share p of the score are never more than p of all.
            chosen = torch.arange(math.ceil(run.esft_p * config.num_experts))
            split_experts(model, dict.fromkeys(find_routers(model), chosen))
            return model
        train_group(model, run.trainable)
    return model


def memory(model: nn.Module, config: Config, run: Run) -> dict[str, int | None]:
    """Part -> bytes on each GPU; None for activations that cannot be counted. The model's tensors become fake.

    logits: in float32, and their gradient; TRL's heads, of all stages but distil, make them in tiles. backward: the
    gradients of what the largest layer keeps, as much again. Under expert parallelism a layer's experts see the tokens
    of all GPUs, and its buffers are made for them.
    """
    rows, length = run.per_device_train_batch_size, run.max_length
    parts: dict[str, int | None] = dict(state_memory(model, config, run))
    if run.stage in (None, "distil"):
        parts["logits"] = rows * length * config.vocab_size * 4 * 2
    experts = TAKEN if by_kernels(run) else "grouped_mm"
    copies = "copies" in parts or (run.casts and "gathered" in parts)
    found = activation_bytes(model, rows, length, run.bf16, run.gradient_checkpointing, experts, copies)
    if found is None:
        return parts | {"activations": None}
    seen = run.gpus if run.splits_experts else 1
    return parts | {"activations": found.kept + (seen - 1) * found.of_layer, "backward": seen * found.of_layer}


def state_memory(model: nn.Module, config: Config, run: Run) -> dict[str, int]:
    """What does not depend on the batch: part -> bytes on each GPU.

    copies: of experts in bfloat16, one a step (training/trainers/copies.py), where the card has room for them.
    gradient_buckets: DistributedDataParallel's copy of the gradients. With zero3 and expert_parallel, gathered: what
    FSDP2 keeps whole for a step (training/trainers/sharded.py), where there is room, or the layer at work and the
    next, where weights are not cast; whole_gradients: of micro-batches before the last.
    """
    trained = [x for x in model.parameters() if x.requires_grad]
    gradients, states = sum(x.nbytes for x in trained), STATES[run.optim]
    adam = states(1) > 0
    parts = {
        "weights": sum(x.nbytes for x in [*model.parameters(), *model.buffers()]),
        "gradients": gradients,
        "optimizer": round(sum(states(x.element_size()) * x.numel() + (4 if adam else 0) for x in trained)),
    }
    if run.casts and (run.gpus == 1 or run.sharding == "none"):
        weights = copied(model, run.gradient_accumulation_steps, run.gradient_checkpointing)
        parts |= {"copies": sum(2 * x.numel() for x in weights)} if weights else {}
    if run.lora_base is not None:
        from ..training.weights.groups import matrices

        plain = meta_model(config, run.dtype)
        packed = [plain.get_parameter(name) for name in matrices(plain)]
        parts["weights"] += round(sum(STORED_BYTES[run.lora_base] * x.numel() - x.nbytes for x in packed))
    for name in SHARDING[run.sharding]:
        parts[name] = math.ceil(parts[name] / run.gpus)
    if run.gpus > 1 and run.sharding == "none":
        parts["gradient_buckets"] = gradients
    if run.gpus > 1 and "weights" in SHARDING[run.sharding]:

        def held(x: torch.Tensor) -> float:
            """The part of a weight that is whole on a GPU: of its own experts under expert parallelism."""
            return 1 / run.gpus if run.splits_experts and x.dim() == 3 else 1

        if run.casts:
            parts["gathered"] = round(sum(held(x) * sent(x) for x in model.parameters()))
        else:
            parts["gathered"] = 2 * largest_layer(model)
        if run.gradient_accumulation_steps > 1:
            parts["whole_gradients"] = round(sum(held(x) * x.nbytes for x in trained))
    return parts


def largest_layer(model: nn.Module) -> int:
    """Bytes of the largest module that FSDP gathers: all, of a host that names none."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = [x for x in base.modules() if type(x).__name__ in (base._no_split_modules or ())] or [base]
    return max(sum(x.nbytes for x in layer.parameters()) for layer in layers)


def flops_per_token(model: nn.Module, config: Config, run: Run) -> dict[str, float] | None:
    """Of a forward, of a backward, of what checkpointing computes again, and of a forward that only counts; None where
    the data decide.

    A backward is two forwards, less the gradients of frozen weights: 6 a parameter become 4. The kernels' experts keep
    nothing of their second product, which is not computed again (kernels/operators.py).
    """
    forward = sizes(config, run.max_length)["flops_per_token"]
    if forward is None:
        return None
    if run.lora_parts is not None or run.esft_p is not None:
        counts = {x: x.numel() for x in model.parameters()}
    else:
        counts = {x: active_part(name, x, config) for name, x in model.named_parameters()}
    trained = sum(count for x, count in counts.items() if x.requires_grad) / sum(counts.values())
    again = repeated(model, config, run, forward - spared(config, run))
    counting = forward if counts_ahead(config, run) else 0
    return {"forward": forward, "backward": forward * (1 + trained), "recomputation": again, "counting": counting}


def by_kernels(run: Run) -> bool:
    """Whether hf_moe's kernels compute the experts, as a recipe on a GPU takes them."""
    return run.experts_implementation in (None, "auto", TAKEN)


def spared(config: Config, run: Run) -> int:
    """FLOPs of a token that a forward does, and full checkpointing does not do again."""
    return expert_flops(config, "down_proj") if by_kernels(run) and isinstance(config, HfMoeConfig) else 0


def repeated(model: nn.Module, config: Config, run: Run, whole: float) -> float:
    """FLOPs of a token that checkpointing does again: the `whole` of layers, or selective the products of low rank."""
    if run.gradient_checkpointing != SELECTIVE:
        return whole if run.gradient_checkpointing else 0
    low = AGAIN - {"down_proj"}  # which mostly ends a layer, after all that is needed again
    named = [(name, x) for name, x in model.named_parameters() if not low.isdisjoint(name.split("."))]
    return 2 * sum(active_part(name, x, config) for name, x in named if not name.endswith("bias"))


def counts_ahead(config: Config, run: Run) -> bool:
    """Whether a balance loss over a step has its micro-batches run once more: not with checkpointing, where they are
    held (training/trainers/holding.py)."""
    coefficient = config.router_aux_loss_coef if run.router_aux_loss_coef is None else run.router_aux_loss_coef
    return bool(coefficient) and run.gradient_accumulation_steps > 1 and not run.gradient_checkpointing
