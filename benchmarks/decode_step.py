"""One recorded step of decoding on a GPU, kernel by kernel: where the time between it and the memory's floor goes.

    python benchmarks/decode_step.py --out benchmarks/results/decode_step.json

The shapes of OLMoE-1B-7B and DeepSeek-V2-Lite in bf16 with random weights and a random cache. A step is timed alone,
replay after replay, medians; `floor` is what it can't but read (benchmarks/mla_decode_gpu.py) at the speed of a large
copy in the same run. Kernels overlap, so that their times, by torch's profiler, add up to more than the step's.
"""

import argparse
import gc
import json
import statistics
from collections import Counter
from pathlib import Path

import torch
import transformers
from mla_decode_gpu import bytes_of_a_step, copy_speed
from torch.profiler import ProfilerActivity, profile

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.model.decoding import HfMoeReservedCache, RecordedStep
from hf_moe.version import __version__

CASES = {
    "olmoe-1b-7b": [(1, 128), (16, 128)],
    "deepseek-v2-lite": [(1, 128), (1, 4096), (1, 32768), (16, 4096)],
}  # of a preset: batch, context


def build(preset: str) -> HfMoeForCausalLM:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = HfMoeForCausalLM(HfMoeConfig.from_preset(preset)).eval()
    torch.set_default_dtype(torch.float32)
    return model


@torch.inference_mode()
def recorded(model: HfMoeForCausalLM, batch: int, context: int) -> RecordedStep:
    """A step behind `context` positions of a random cache."""
    cache = HfMoeReservedCache(model.config.num_hidden_layers, context + 128)
    ids = torch.randint(3, model.config.vocab_size, (batch, 1), device="cuda")
    model(ids, past_key_values=cache)  # which gives the layers their shapes
    for layer in cache.layers:
        layer.reserve(context + 128)
        for memory in (layer.keys, layer.values):
            memory[:, :, :context].normal_()
        layer.length = context
    step = RecordedStep(model, cache, batch, padded=False)
    step.record()
    step.begin(torch.full((batch, 1), context, device="cuda"), None)
    return step


def some_tokens(step: RecordedStep) -> torch.Tensor:
    return torch.arange(3, 3 + len(step.ids), device="cuda")


def step_microseconds(step: RecordedStep, rounds: int = 5, replays: int = 8) -> float:
    """One replay behind the other, as generate() asks for them; the first round warms up."""
    token, times = some_tokens(step), []
    for _ in range(1 + rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            step(token)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / replays)
    return statistics.median(times[1:])


def kernels_of(step: RecordedStep, replays: int = 5) -> dict[str, dict[str, float]]:
    token = some_tokens(step)
    step(token)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(replays):
            step(token)
        torch.cuda.synchronize()
    counts, times = Counter(), Counter()
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            counts[event.name[:60]] += 1 / replays
            times[event.name[:60]] += event.device_time / replays
    return {
        name: {"launches": round(counts[name], 1), "microseconds": round(time, 1)}
        for name, time in times.most_common()
        if time >= 1
    }


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--presets", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    bandwidth, results = copy_speed(), {}
    versions = {"hf_moe": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    report = {"device": torch.cuda.get_device_name(), "versions": versions}
    report |= {"copy_terabytes_per_second": round(bandwidth / 1e12, 2), "results": results}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for preset in args.presets:
        model = build(preset)
        for batch, context in CASES[preset]:
            step = recorded(model, batch, context)
            took = step_microseconds(step)
            kernels = kernels_of(step)
            del step
            floor = bytes_of_a_step(model, batch, context, 64) / bandwidth * 1e6
            row = {"step_microseconds": round(took, 1), "floor_microseconds": round(floor, 1)}
            row |= {"share_of_floor": round(floor / took, 3), "tokens_per_second": round(batch / took * 1e6, 1)}
            print(f"{preset} batch {batch} context {context}: {row}", flush=True)
            for name, of_kernel in kernels.items():
                print(f"    {name:60s} {of_kernel['launches']:6.1f} {of_kernel['microseconds']:9.1f}", flush=True)
            results[f"{preset}, batch {batch}, context {context}"] = row | {"kernels": kernels}
            args.out.write_text(json.dumps(report, indent=2) + "\n")
        del model
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
