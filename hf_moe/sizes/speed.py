"""How long an optimizer step takes on one H100 or H200: a few terms, whose costs are fitted on measured runs.

The GPU's products and the host's launches overlap, so the slower of them counts; what comes after the last backward
pass is added, and what GPUs send each other, as if nothing else went on. COSTS and RANGE are from the tables in
benchmarks/results, by `benchmarks/fit_speed.py`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from ..kernels.copies import sent
from ..model.configuration_hf_moe import HfMoeConfig
from .counts import expert_flops

# FLOP/s of a layer's experts forward and backward in bfloat16, on an H100 (benchmarks/results/moe_layer.json).
EXPERTS = {"grouped_mm": 269.5e12, "hf_moe": 532.2e12, "sonicmoe": 551.4e12}
TAKEN = "hf_moe"  # by a recipe that names none, on a GPU
DENSE = 450e12  # of the other products, attention included: what the whole OLMoE reaches (whole_model.json)


class Costs(NamedTuple):
    """What each thing that `Work` counts takes."""

    float32_flop: float  # seconds a FLOP, where weights in float32 are multiplied as they are
    layer: float  # seconds of the host a layer and pass: launches
    adapter: float  # the same a matrix with an adapter
    balance: float  # the same a layer with a balance loss, its launches of a forward that counts among them
    batch: float  # seconds of the host that a trainer takes for a micro-batch: collation, metrics
    trained_byte: float  # seconds a byte of trained weights: sums, clipping, optimizer, casts
    length: float  # seconds of a padded length that attention has no plan for yet
    sent_byte: float  # seconds a byte that a GPU gets from the others of its host


COSTS = Costs(
    float32_flop=3.28e-14,
    layer=0.00125,
    adapter=0.000724,
    balance=0.00118,
    batch=0.196,
    trained_byte=2.66e-12,
    length=0.324,
    sent_byte=2.35e-12,
)
# Measured tokens a second over predicted, where a run was left out of the fit: the lowest and the highest.
RANGE = (0.68, 1.21)


@dataclass(frozen=True)
class Work:
    """Of one optimizer step on one GPU: seconds of products at measured rates, and what Costs names, counted."""

    products: float
    float32_flops: float
    layers: int
    adapters: int
    balance: int
    batches: int
    trained_bytes: int
    lengths: float = 0.0
    sent_bytes: float = 0.0


def seconds(work: Work, costs: Costs = COSTS):
    gpu = work.products + work.float32_flops * costs.float32_flop
    host = work.layers * costs.layer + work.adapters * costs.adapter
    host = host + work.balance * costs.balance + work.batches * costs.batch
    after = work.trained_bytes * costs.trained_byte + work.sent_bytes * costs.sent_byte
    return slower(gpu, host) + after + work.lengths * costs.length


def slower(gpu, host):
    return gpu if gpu > host else host


def count(model: nn.Module, config: HfMoeConfig, run, flops_per_token: dict[str, float]) -> Work:
    """The work of `run` (plan.Run) on a model as `plan.model_to_train` makes it. Raises ValueError for experts whose
    speed was not measured."""
    experts = TAKEN if run.experts_implementation in (None, "auto") else run.experts_implementation
    if experts not in EXPERTS:
        raise ValueError(f"experts_implementation is {experts}; plan knows the speed of {', '.join(EXPERTS)}.")
    batches = run.gradient_accumulation_steps
    tokens = run.per_device_train_batch_size * run.max_length * batches
    forward, flops = flops_per_token["forward"], sum(flops_per_token.values()) * tokens
    experts_forward, again = expert_flops(config), flops_per_token["recomputation"]
    # Selective checkpointing computes no experts again, full checkpointing all that is again but what is no expert's.
    experts_again = max(0, again - (forward - experts_forward)) if run.gradient_checkpointing is True else 0
    of_experts = (flops - again * tokens) * experts_forward / forward + experts_again * tokens
    work = {DENSE: flops - of_experts, EXPERTS[experts]: of_experts}
    slow, float32 = 0.0, next(model.parameters()).dtype == torch.float32
    if float32 and not run.bf16:
        slow, work = flops, {}
    elif float32 and experts == "grouped_mm":
        # Autocast does not reach Transformers' grouped product, which takes the weights as they are.
        slow = work.pop(EXPERTS[experts])
    passes = batches * (3 if run.gradient_checkpointing else 2)
    trained = [x for x in model.parameters() if x.requires_grad]
    coefficient = config.router_aux_loss_coef if run.router_aux_loss_coef is None else run.router_aux_loss_coef
    return Work(
        products=sum(count / rate for rate, count in work.items()),
        float32_flops=slow,
        layers=config.num_hidden_layers * passes,
        adapters=passes * (len(trained) // 2 if run.lora_parts is not None else 0),
        balance=batches * config.mlp_layer_types.count("sparse") * bool(coefficient),
        batches=batches,
        trained_bytes=sum(x.nbytes for x in trained),
        sent_bytes=received(model, config, run, passes) if run.gpus > 1 else 0.0,
    )


def received(model: nn.Module, config: HfMoeConfig, run, passes: int) -> float:
    """Bytes that a GPU gets from the others in a step, over so many passes through a layer.

    With zero3 each weight once, where it stays whole for a step, or in each forward and each backward, and the sum of
    its gradients once; under expert parallelism of the experts neither, but in each pass the other GPUs' tokens and
    what their experts add to this one's (kernels/expert_parallel.py). Else gradients are summed and given to all.
    """
    others = (run.gpus - 1) / run.gpus
    if run.sharding not in ("zero3", "expert_parallel"):
        return 2 * others * sum(x.nbytes for x in model.parameters() if x.requires_grad)
    held = [x for x in model.parameters() if not (run.splits_experts and x.dim() == 3)]
    each_time = 2 * run.gradient_accumulation_steps * sum(x.nbytes for x in held)
    weights = sum(map(sent, held)) if run.casts else each_time
    gradients = sum(x.numel() * (4 if run.bf16 else x.element_size()) for x in held if x.requires_grad)
    sharded = others * (weights + gradients)
    if not run.splits_experts:
        return sharded
    tokens = run.per_device_train_batch_size * run.max_length * (run.gpus - 1)
    layers = config.mlp_layer_types.count("sparse")
    return sharded + passes * layers * 2 * tokens * config.hidden_size * (2 if run.bf16 else 4)
