"""OLMoE-1B-7B's shape on a GPU: a training step, a prefill, decoding through generate(), beside Transformers' OLMoE.

    python benchmarks/whole_model.py --out benchmarks/results/whole_model.json

6.92B parameters in bfloat16 with random weights, a fresh model for each work. Tokens a second: of a training step
forward and backward over 2 x 4096 tokens, with the memory at its peak, weights and gradients included, and with
Liger's kernels where they know the model; of generate() with one token after 8192; of greedy decoding after 128
tokens, the time of 1 + new tokens less that of 1. Medians of several rounds, after a warm-up. Transformers' model runs
as it is loaded, then (`compiled`) with a static cache and the compiled step that comes with it, and after
`hf_moe.fast_generate`. `floor` of decoding is the bytes that a step must read, at the speed of a large copy.
"""

import argparse
import gc
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import transformers
from mla_decode_gpu import bytes_of_a_step, copy_speed, decode_speed
from mla_decode_gpu import seconds as generation_seconds
from olmoe import build, hf_moe_model, shape, transformers_model
from transformers.integrations.liger import apply_liger_kernel
from transformers.integrations.sonicmoe import is_sonicmoe_loadable

from hf_moe import fast_generate
from hf_moe.kernels import liger
from hf_moe.version import __version__

SHAPE = shape()


# name -> (what builds the model, its experts' implementation in training and prefill, how it decodes)
PEERS = {
    "hf_moe": (hf_moe_model, "hf_moe", {}),
    "transformers": (transformers_model, "grouped_mm", {}),
    "transformers, hf_moe's experts": (transformers_model, "hf_moe", None),
    "transformers, SonicMoE": (transformers_model, "sonicmoe", None),
    "transformers, compiled": (transformers_model, None, {"cache_implementation": "static"}),
    "transformers, fast_generate": (lambda config: fast_generate(transformers_model(config)), None, {}),
}


def median_seconds(function, rounds: int) -> float:
    """Of `rounds` calls, after two that load and tune."""
    times = []
    for _ in range(rounds + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def training(model, implementation: str, rounds: int) -> dict[str, dict[str, float]]:
    ids = torch.randint(0, SHAPE.vocab_size, (2, 4096), device="cuda")
    model.train().set_experts_implementation(implementation)
    apply_liger_kernel(model, None)  # as TrainingArguments(use_liger_kernel=True) does

    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(step, rounds)
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"training": {"tokens_per_second": round(ids.numel() / seconds, 1), "peak_gib": round(peak, 1)}}


def prefill(model, implementation: str, rounds: int) -> dict[str, dict[str, float]]:
    ids = torch.randint(0, SHAPE.vocab_size, (1, 8192), device="cuda")
    model.eval().set_experts_implementation(implementation)
    seconds = median_seconds(lambda: generation_seconds(model, ids, 1), rounds)
    return {"prefill": {"tokens_per_second": round(ids.numel() / seconds, 1)}}


def decoding(model, name: str, options: dict, rounds: int, bandwidth: float) -> dict[str, dict[str, float]]:
    results = {}
    for batch in (1, 16):
        results[f"decoding, batch {batch}"] = row = decode_speed(model.eval(), batch, 128, 128, rounds, **options)
        if name == "hf_moe":
            bound = bandwidth / bytes_of_a_step(model, batch, 128, 128) * batch
            row["floor_tokens_per_second"] = round(bound, 1)
    return results


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    installed = [name for name in PEERS if name != "transformers, SonicMoE" or is_sonicmoe_loadable()]
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=installed)
    args = parser.parse_args()
    liger.register()
    results, bandwidth = {}, copy_speed()
    versions = {"hf_moe": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    report = {"device": torch.cuda.get_device_name(), "versions": versions}
    report |= {"copy_terabytes_per_second": round(bandwidth / 1e12, 2), "results": results}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in args.peers:
        make, implementation, options = PEERS[name]
        works, results[name] = [], {}
        if options is not None:
            works.append(partial(decoding, name=name, options=options, bandwidth=bandwidth))
        if implementation is not None:
            works += [partial(work, implementation=implementation) for work in (prefill, training)]
        for work in works:
            rows = work(build(make, SHAPE, "cuda", torch.bfloat16), rounds=args.rounds)
            gc.collect()
            torch.cuda.empty_cache()
            results[name] |= rows
            for title, row in rows.items():
                print(f"{name:32s} {title:20s} {row}", flush=True)
            args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
