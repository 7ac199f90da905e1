"""The bubble of each pipeline schedule on two GPUs, beside its formula.

    python benchmarks/pipeline_gpu.py --out benchmarks/results/pipeline_gpu.json

A step of M micro-batches takes M t + b, with t the work of a process for one of them and b the bubble: a line through
the measured times of several M gives both. Beside it stands the formula of hf_moe.sizes.pipeline, with the times that
the stages of a process take by themselves for a forward, for gradients of inputs and for those of weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.distributed as dist
from hf_moe.training.trainers.pipeline.parts import Part, cut
from hf_moe.training.trainers.pipeline.passes import Passes
from hf_moe.training.trainers.pipeline.schedules import SCHEDULES, process_of

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.sizes.pipeline import BUBBLES

PROCESSES = 2
MICRO_BATCHES = (4, 8, 12)
WARM, TIMED = 2, 5  # steps
LARGE = {
    "vocab_size": 8192,
    "hidden_size": 2048,
    "intermediate_size": 4096,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": 2,
}
SMALL = LARGE | {"vocab_size": 97, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 4}
SHAPE = {"cuda": (4, 1024), "cpu": (2, 16)}  # rows, tokens


def median_time(run: Callable[[], object], device: torch.device, times: int = TIMED) -> float:
    """Seconds, on the slowest process."""
    found = []
    for number in range(WARM + times):
        wait(device)
        dist.barrier()
        start = time.perf_counter()
        run()
        wait(device)
        if number >= WARM:
            found.append(time.perf_counter() - start)
    slowest = torch.tensor(statistics.median(found), device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.item()


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def line(points: dict[int, float]) -> tuple[float, float]:
    """Slope and intercept of the least squares."""
    mean_x, mean_y = (sum(x) / len(points) for x in (points.keys(), points.values()))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points.items()) / sum((x - mean_x) ** 2 for x in points)
    return slope, mean_y - slope * mean_x


def times_alone(parts: list[Part], states: torch.Tensor, device: torch.device) -> dict[str, float]:
    """Of the stages of this process one after the other, without the other process: forward, backward, and of that
    the gradients of inputs."""
    number = torch.tensor(0)

    def forward(part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        received = states.detach().requires_grad_()
        return received, part(received, number).sum()

    def run(gradients: Callable | None) -> None:
        for part in parts:
            received, output = forward(part)
            if gradients is not None:
                gradients(part, received, output)

    def of_inputs(part: Part, received: torch.Tensor, output: torch.Tensor) -> None:
        if not part.first:  # which has no inputs with a gradient
            torch.autograd.grad(output, received)

    def of_all(part: Part, received: torch.Tensor, output: torch.Tensor) -> None:
        weights = [x for x in part.parameters() if x.requires_grad]
        torch.autograd.grad(output, weights if part.first else [received, *weights], allow_unused=True)

    alone = {
        name: median_time(lambda gradients=gradients: run(gradients), device)
        for name, gradients in (("forward", None), ("inputs", of_inputs), ("backward", of_all))
    }
    forwards = alone["forward"]
    return alone | {name: alone[name] - forwards for name in ("inputs", "backward")}


def measured(name: str, device: torch.device) -> dict:
    """One schedule: its times, and the bubble by the line and by the formula."""
    schedule = SCHEDULES[name]
    torch.manual_seed(0)
    sizes = LARGE if device.type == "cuda" else SMALL
    model = HfMoeForCausalLM(HfMoeConfig(**sizes)).to(
        device, torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    model.set_experts_implementation("grouped_mm" if device.type == "cuda" else "eager")
    model.config.output_router_logits, model.config.router_aux_loss_coef = False, 0.0
    stages = PROCESSES * schedule.stages
    own = [x for x in range(stages) if process_of(x, PROCESSES, schedule.folded) == dist.get_rank()]
    parts = cut(model, stages, own)
    shape = SHAPE[device.type]
    ids = torch.randint(1, sizes["vocab_size"], shape, device=device)

    def run(part: Part, received: torch.Tensor, number: int) -> torch.Tensor:
        with part.in_place(received, ids):
            if part.last:
                return model(ids, labels=ids, use_cache=False).loss
            return model.base_model(ids, use_cache=False).last_hidden_state

    for part in parts:
        part.run = run
    passes = Passes(parts, schedule, sizes["hidden_size"], model.dtype, device, *[dist.group.WORLD] * 2)
    states = torch.randn(*shape, sizes["hidden_size"], device=device, dtype=model.dtype)
    alone = times_alone(parts, states, device)

    def step(count: int) -> None:
        passes.forward_and_back([shape] * count)
        model.zero_grad()

    times = {count: median_time(lambda count=count: step(count), device) for count in MICRO_BATCHES}
    work, bubble = line(times)
    weights = max(0.0, alone["backward"] - alone["inputs"])
    formula = BUBBLES[name](PROCESSES, alone["forward"], alone["backward"], weights)
    few = MICRO_BATCHES[0]
    return {
        "step_ms": {count: round(1e3 * x, 2) for count, x in times.items()},
        "alone_ms": {key: round(1e3 * x, 2) for key, x in alone.items()},
        "work_ms": round(1e3 * work, 2),
        "bubble_ms": round(1e3 * bubble, 2),
        "formula_ms": round(1e3 * formula, 2),
        "share": round(bubble / times[few], 4),
        "formula_share": round(formula / (formula + few * (alone["forward"] + alone["backward"])), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    if "RANK" not in os.environ:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES)]
        sys.exit(subprocess.run([*launch, *sys.argv]).returncode)
    on_gpu = torch.cuda.device_count() >= PROCESSES
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    found = {name: measured(name, device) for name in SCHEDULES}
    if rank == 0:
        report = {
            "date": datetime.now(UTC).date().isoformat(),
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
            "torch": torch.__version__,
            "processes": PROCESSES,
            "shares_of_a_step_of": MICRO_BATCHES[0],
            "schedules": found,
        }
        out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(report, indent=1))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
