"""Fit the costs of `hf_moe.speed` on the training runs of the tables in benchmarks/results, and say how far it goes.

    python benchmarks/fit_speed.py

Least fourth powers of the logarithm of predicted over measured seconds, as the plan says how far off the worst is.
Each run is also predicted by the others alone: the range that `hf-moe plan` prints. Of the fine-tuning table the
lengths are estimates: GSM8K's rows have 150 tokens on average, the longest of 64 about 420, and 75 of its 106
micro-batches have a length of their own; its first run meets them, the others in the same process find attention's
plans made.
"""

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from hf_moe.training.main import arguments_of

from hf_moe import HfMoeConfig
from hf_moe.sizes.plan import Run, flops_per_token, model_to_train, run_of_recipe
from hf_moe.sizes.speed import COSTS, Costs, Work, count, seconds

RESULTS = Path(__file__).parent / "results"
OLMOE = HfMoeConfig.from_preset("olmoe-1b-7b")
SMOLLM2 = HfMoeConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    moe_intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    num_experts=8,
    num_experts_per_tok=2,
    tie_word_embeddings=True,
)
SHARDED = {
    "vocab_size": 4096,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "router_type": "sigmoid_topk",
}
WIDE = {"hidden_size": 4096, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 32}
WIDE |= {"num_key_value_heads": 8, "num_experts": 16, "n_shared_experts": 16}
# Runs of benchmarks/recipe_speed.py -> their model and recipe, and what else decides about their time and memory.
# Recipes with torchao's optimizer need torchao themselves: others stand for them.
IN_8_BITS = {"dtype": "bfloat16", "optim": "adamw_torch_8bit"}
ON_TWO = {"gpus": 2, "sharding": "zero3"}
RECIPES = {
    "sft": ("olmoe-1b-7b/sft", {}),
    "sft_bf16": ("olmoe-1b-7b/sft", IN_8_BITS),
    "lora_experts": ("olmoe-1b-7b/lora_experts", {}),
    "sft, fsdp2": ("olmoe-1b-7b/sft", ON_TWO),
    "sft, expert parallel": ("olmoe-1b-7b/sft", {"gpus": 2, "sharding": "expert_parallel"}),
    "Qwen3-30B, lora_experts": ("qwen3-30b-a3b/lora_experts", {}),
    "Qwen3-30B, sft, fsdp2": (
        "qwen3-30b-a3b/lora_experts",
        IN_8_BITS
        | ON_TWO
        | {"lora_parts": None, "bf16": False, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
    ),
}
AVERAGE, PADDED, NEW_LENGTHS = 150, 420, 75 / 53
TUNED = {
    "full": {},
    "dense_only": {"trainable": "dense_only"},
    "esft": {"esft_p": 0.2, "router_aux_loss_coef": 0.0},
    "lora on experts": {"lora_parts": ["routed_experts"], "lora_r": 8},
    "lora on attention": {"lora_parts": ["attention"]},
}


@dataclass(frozen=True)
class Point:
    """A measured optimizer step."""

    name: str
    work: Work
    seconds: float

    def speed(self, costs: Costs = COSTS) -> float:
        """Measured tokens a second over predicted ones."""
        return float(seconds(self.work, costs) / self.seconds)


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def work(config: HfMoeConfig, bare: bool = False, **run) -> Work:
    """`bare`: a loop without a trainer."""
    run = Run(**{"gradient_checkpointing": False, **run})
    model = model_to_train(config, run)
    counted = count(model, config, run, flops_per_token(model, config, run))
    return replace(counted, batches=0) if bare else counted


def points() -> list[Point]:
    whole = read("whole_model.json")["results"]["hf_moe"]["training"]["tokens_per_second"]
    shape = {"per_device_train_batch_size": 2, "max_length": 4096, "experts_implementation": "hf_moe"}
    bare = replace(work(OLMOE, bare=True, dtype="bfloat16", **shape), trained_bytes=0)  # no optimizer
    found = [Point("OLMoE, forward and backward", bare, 2 * 4096 / whole)]

    rows = {"per_device_train_batch_size": 64, "max_length": PADDED, "gradient_accumulation_steps": 2}
    for name, settings in TUNED.items():
        measured = read("finetune/finetune.json")["tuned"][name]["tokens_per_second"]
        step = work(SMOLLM2, experts_implementation="hf_moe", **rows, **settings)
        step = replace(step, lengths=NEW_LENGTHS if name == "full" else 0)
        found.append(Point(f"SmolLM2, {name}", step, 128 * AVERAGE / measured))

    rows = {"per_device_train_batch_size": 16, "max_length": 512, "experts_implementation": "grouped_mm"}
    for name, config, measured in (
        ("wide layers", SHARDED | WIDE, read("float8_training_gpu.json")["bfloat16"]["tokens_per_second"]),
        ("small layers", SHARDED, read("sharding_gpu.json")["one-bfloat16"]["tokens_per_second"]),
    ):
        found.append(Point(name, work(HfMoeConfig(**config), **rows), 16 * 512 / measured))

    adapter = {"lora_parts": ["attention", "routed_experts"], "lora_r": 8, "router_aux_loss_coef": 0.0}
    adapter["experts_implementation"] = "grouped_mm"
    step = work(OLMOE, bare=True, dtype="bfloat16", max_length=2048, gradient_checkpointing=True, **adapter)
    found.append(Point("OLMoE, adapters", step, read("qlora_gpu.json")["runs"][0]["seconds_a_step"]))

    for name, config, run, measured in recipe_runs():
        found.append(Point(name, work(config, **vars(run)), statistics.median(measured["step_seconds"][2:])))
    return found


def recipe_runs() -> Iterator[tuple[str, HfMoeConfig, Run, dict]]:
    """Name, what `hf-moe plan` is told, and what was measured."""
    files = ("recipe_speed_qwen3.json", "recipe_speed_two_gpus.json", "recipe_speed.json")
    runs = {name: run for file in files for name, run in read(file)["runs"].items()}
    for name, (recipe, settings) in RECIPES.items():
        run = run_of_recipe(arguments_of(recipe), experts_implementation="hf_moe", **settings)
        yield name, HfMoeConfig.from_preset(recipe.partition("/")[0]), run, runs[name]


FIRST = Costs(1 / 40e12, 2e-3, 5e-4, 1e-3, 0.1, 1 / 60e9, 0.3, 1 / 80e9)


def fit(measured: list[Point], first: Costs = FIRST, steps: int = 3000) -> Costs:
    logs = torch.tensor(first, dtype=torch.float64).log().requires_grad_()
    optimizer = torch.optim.Adam([logs], lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        costs = Costs(*logs.exp())
        errors = torch.stack([(seconds(x.work, costs) / x.seconds).log() for x in measured])
        errors.pow(4).sum().backward()
        optimizer.step()
        schedule.step()
    return Costs(*(float(f"{x:.3g}") for x in logs.exp().tolist()))


def main() -> None:
    measured = points()
    costs = fit(measured)
    print(costs)
    alone = []
    for point in measured:
        alone.append(point.speed(fit([x for x in measured if x is not point])))
        print(f"{point.name:45s} {point.seconds:.3f} s, x{point.speed(costs):.2f}; left out x{alone[-1]:.2f}")
    print(f"RANGE = ({min(alone):.2f}, {max(alone):.2f})")


if __name__ == "__main__":
    main()
