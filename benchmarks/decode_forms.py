"""Decoding on a GPU with weights in 8 and 4 bits, and with an adapter, merged or not, beside bf16.

    python benchmarks/decode_forms.py --out benchmarks/results/decode_forms.json

OLMoE-1B-7B's and DeepSeek-V2-Lite's shapes with random weights. Of each form the recorded step alone, replay after
replay, its kernels (which overlap), and `generate()` of 256 tokens behind a prompt of 128, greedy; medians. The
adapter has rank 16, on the projections of attention and on all experts. Ratios are to bf16 in the same run.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from decode_step import build, kernels_of, recorded, step_microseconds
from hf_moe.training.weights.groups import matrices
from hf_moe.training.weights.quantized import quantize
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_moe.stored_weights import FORMS
from hf_moe.version import __version__

PROMPT, NEW = 128, 256
BATCHES = (1, 4, 16)


def store(model: nn.Module, stored: str) -> None:
    quantize(model, matrices(model), None, stored)


def adapt(model: nn.Module, merged: bool) -> None:
    found = matrices(model)
    experts = [name for name, part in found.items() if part == "routed_experts"]
    linears = {name.split(".")[-2] for name, part in found.items() if part == "attention"} - {"kv_b_proj"}
    config = LoraConfig(r=16, target_modules=sorted(linears), target_parameters=experts)
    wrapped = get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, x in wrapped.named_parameters():
            if "lora_B" in name:  # zero at first
                x.normal_(std=0.01)
    if merged:
        wrapped.merge_and_unload()


FORMS_MEASURED: dict[str, Callable[[nn.Module], None] | None] = {"bf16": None}
FORMS_MEASURED |= {stored: partial(store, stored=stored) for stored in FORMS}
FORMS_MEASURED |= {"adapter, merged": partial(adapt, merged=True), "adapter": partial(adapt, merged=False)}


def generated(model: nn.Module, batch: int) -> float:
    """Tokens a second of a whole `generate()`, recorded before."""
    ids = torch.randint(3, model.config.vocab_size, (batch, PROMPT), device=model.device)
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    times = []
    for _ in range(4):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return batch * NEW / statistics.median(times[1:])


def measured(preset: str, change: Callable[[nn.Module], None] | None, batches: list[int]) -> dict[str, dict]:
    model = build(preset)
    if change is not None:
        change(model)
    gc.collect()
    torch.cuda.empty_cache()
    rows, memory = {}, torch.cuda.memory_allocated()
    for batch in batches:
        step = recorded(model, batch, PROMPT)
        with torch.inference_mode():
            took, kernels = step_microseconds(step), kernels_of(step)
        del step
        rows[str(batch)] = {
            "step_microseconds": round(took, 1),
            "tokens_per_second": round(generated(model, batch), 1),
            "weights_gib": round(memory / 2**30, 2),
            "kernels": kernels,
        }
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--presets", nargs="+", default=["olmoe-1b-7b", "deepseek-v2-lite"])
    parser.add_argument("--forms", nargs="+", choices=FORMS_MEASURED, default=list(FORMS_MEASURED))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    args = parser.parse_args()
    versions = {"hf_moe": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    results: dict[str, dict] = {}
    report = {"device": torch.cuda.get_device_name(), "versions": versions, "results": results}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for preset in args.presets:
        results[preset] = {}
        for form in args.forms:
            rows = results[preset][form] = measured(preset, FORMS_MEASURED[form], args.batches)
            for batch, row in rows.items():
                plain = results[preset].get("bf16", {}).get(batch)
                if plain is not None:
                    row["ratio"] = round(row["tokens_per_second"] / plain["tokens_per_second"], 2)
                    row["step_ratio"] = round(plain["step_microseconds"] / row["step_microseconds"], 2)
                shown = {name: x for name, x in row.items() if name != "kernels"}
                print(f"{preset}, {form}, batch {batch}: {shown}", flush=True)
            args.out.write_text(json.dumps(report, indent=2) + "\n")
            gc.collect()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
