"""What activation checkpointing saves and what it costs: a few of a model's layers with none, selective and full.

    python benchmarks/recomputation.py --out benchmarks/results/recomputation.json

Weights as recipes train them, in float32 under bfloat16's autocast, or with --dtype bfloat16 in that; random tokens,
our kernels, and Liger's norms where they are installed. A step is a forward and a backward of the decoder: the median
of milliseconds, with the share that it is over none, and the most memory beyond what stood before, of which `saved` is
the share of what full checkpointing saves. `counted` are KiB a token and layer that `hf-moe plan` counts, with the
model's own norms; a CPU gives these alone.
"""

import argparse
import json
import statistics
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers

from hf_moe import HfMoeConfig, HfMoeModel
from hf_moe.kernels import liger
from hf_moe.kernels.recomputation import SELECTIVE, Selective
from hf_moe.sizes.activations import activation_bytes
from hf_moe.sizes.plan import meta_model
from hf_moe.version import __version__

KINDS = {"none": False, "selective": SELECTIVE, "full": True}
PRESETS = ("deepseek-v2-lite", "olmoe-1b-7b", "qwen3-30b-a3b")


def config_of(preset: str, layers: int) -> HfMoeConfig:
    """The first of its sparse layers, and few tokens to choose from."""
    whole = HfMoeConfig.from_preset(preset).to_dict()
    few = {"num_hidden_layers": layers, "layer_types": whole["layer_types"][:layers], "num_mtp_layers": 0}
    few |= {"mlp_layer_types": ["sparse"] * layers, "vocab_size": 64, "pad_token_id": None}
    return HfMoeConfig(**whole | few)


def counted(preset: str, kind: bool | str, sizes: argparse.Namespace) -> float:
    """KiB that one more layer keeps of a token."""
    kept = [
        activation_bytes(
            *(meta_model(config_of(preset, layers), sizes.dtype), sizes.rows, sizes.length),
            *(sizes.dtype == "float32", kind, "hf_moe"),
            copies=True,
        ).kept
        for layers in (1, 2)
    ]
    return (kept[1] - kept[0]) / sizes.rows / sizes.length / 1024


def measured(preset: str, kind: bool | str, sizes: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = HfMoeModel(config_of(preset, sizes.layers)).to(getattr(torch, sizes.dtype)).train()
        ids = torch.randint(0, 64, (sizes.rows, sizes.length))
    model.set_experts_implementation("hf_moe")
    if find_spec("liger_kernel"):
        liger.apply_liger_kernel_to_hf_moe(model)
    selective = Selective()
    if kind:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if kind == SELECTIVE:
        selective.begin(model)
    times, peaks = [], []
    for _ in range(sizes.steps):
        model.zero_grad(set_to_none=False)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        with torch.autocast("cuda", torch.bfloat16, enabled=sizes.dtype == "float32"):
            loss = model(ids, use_cache=False).last_hidden_state.float().square().mean()
        loss.backward()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del loss
    selective.end()
    warm = sizes.steps // 3  # the first step makes gradients, and kernels are tuned
    return {"ms": round(statistics.median(times[warm:]), 2), "peak_mib": round(max(peaks[warm:]) / 2**20, 1)}


def compare(rows: dict[str, dict[str, float]], name: str) -> float:
    """Of what full checkpointing saves, the share that selective does."""
    none, selective, full = (rows[kind][name] for kind in KINDS)
    return round((none - selective) / (none - full), 3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--presets", nargs="+", default=PRESETS)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    for name, default in {"layers": 4, "rows": 4, "length": 4096, "steps": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    sizes, on_gpu = parser.parse_args(), torch.cuda.is_available()
    results = {}
    for preset in sizes.presets:
        rows = {name: {"counted_kib": round(counted(preset, kind, sizes), 1)} for name, kind in KINDS.items()}
        shares = {"saved_counted": compare(rows, "counted_kib")}
        if on_gpu:
            for name, kind in KINDS.items():
                rows[name] |= measured(preset, kind, sizes)
                torch.cuda.empty_cache()
            shares["saved"] = compare(rows, "peak_mib")
            shares |= {f"slower_{x}": round(rows[x]["ms"] / rows["none"]["ms"] - 1, 3) for x in ("selective", "full")}
        results[preset] = rows | shares
        print(preset, json.dumps(results[preset]), flush=True)
    if sizes.out:
        device = torch.cuda.get_device_name() if on_gpu else "CPU: counted, not measured"
        versions = {"hf_moe": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        setting = {name: value for name, value in vars(sizes).items() if name not in ("out", "presets")}
        report = {"device": device, "versions": versions, "setting": setting, "results": results}
        sizes.out.parent.mkdir(parents=True, exist_ok=True)
        sizes.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
