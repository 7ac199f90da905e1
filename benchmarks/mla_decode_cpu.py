"""Time per decoded token on the CPU: hf_moe's latent attention beside Transformers' DeepSeek-V2.

    python benchmarks/mla_decode_cpu.py [--out benchmarks/results/mla_decode_cpu.md]

One layer dense and one sparse of DeepSeek-V2-Lite's sizes, batch 1. Both models share their weights, start from the
same random latents in a dynamic cache, and decode the same tokens in turn, so that noise hits both; their logits are
compared. Every context is timed in every round; the table gives the median over rounds of each round's median step.
"""

import argparse
import os
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DynamicCache

import hf_moe
from hf_moe.model.growing_layer import grow_in_place

SIZES = {
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
}


def build(dtype: torch.dtype) -> dict[str, torch.nn.Module]:
    """Both models on one set of weights."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    theirs = DeepseekV2ForCausalLM(DeepseekV2Config(**SIZES, n_routed_experts=64, first_k_dense_replace=1)).eval()
    with torch.device("meta"):
        ours = hf_moe.HfMoeForCausalLM(
            hf_moe.HfMoeConfig(
                **SIZES,
                num_experts=64,
                attention_type="mla",
                rope_interleave=True,
                mlp_layer_types=["dense", "sparse"],
            )
        ).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    ours.model.rotary_emb = type(ours.model.rotary_emb)(ours.config)  # its buffers are in no state dict
    torch.set_default_dtype(torch.float32)
    return {"hf_moe": ours, "transformers": theirs}


def filled_caches(models: dict, context: int, dtype: torch.dtype) -> dict[str, DynamicCache]:
    """The same `context` random latents for both. Transformers' DeepSeek-V2 keeps rotated pairs side by side."""
    caches = {name: DynamicCache(config=model.config) for name, model in models.items()}
    rank, rope = SIZES["kv_lora_rank"], SIZES["qk_rope_head_dim"]
    for layer in range(SIZES["num_hidden_layers"]):
        latent = torch.randn(1, 1, context, rank, dtype=dtype)
        key_rope = torch.randn(1, 1, context, rope, dtype=dtype)
        caches["transformers"].update(latent, key_rope, layer)
        halves = torch.cat((key_rope[..., 0::2], key_rope[..., 1::2]), dim=-1)
        grow_in_place(caches["hf_moe"], layer)  # as the first forward pass would
        caches["hf_moe"].update(latent, halves, layer)
    return caches


def step(model: torch.nn.Module, token: torch.Tensor, cache: DynamicCache) -> tuple[torch.Tensor, float]:
    start = time.perf_counter()
    logits = model(token, past_key_values=cache, use_cache=True).logits
    return logits, time.perf_counter() - start


def measure(models: dict, contexts: list[int], steps: int, rounds: int, dtype: torch.dtype) -> tuple[dict, float]:
    """Median seconds a step per (context, model), and the largest difference of logits relative to the largest."""
    seconds, difference = {(c, name): [] for c in contexts for name in models}, 0.0
    tokens = torch.randint(SIZES["vocab_size"], (steps + 1, 1, 1))
    for _ in range(rounds):
        for context in contexts:
            caches = filled_caches(models, context, dtype)
            times = {name: [] for name in models}
            for token in tokens:
                logits = {}
                for name, model in models.items():
                    logits[name], elapsed = step(model, token, caches[name])
                    times[name].append(elapsed)
                off = (logits["hf_moe"] - logits["transformers"]).abs().max() / logits["transformers"].abs().max()
                difference = max(difference, off.item())
            for name, values in times.items():
                seconds[context, name].append(statistics.median(values[1:]))  # the first step warms up
    return {key: statistics.median(values) for key, values in seconds.items()}, difference


def table(seconds: dict, contexts: list[int]) -> str:
    lines = ["| context | Transformers, ms a token | hf_moe, ms a token | ratio |", "|---:|---:|---:|---:|"]
    for context in contexts:
        theirs, ours = (1e3 * seconds[context, name] for name in ("transformers", "hf_moe"))
        lines.append(f"| {context} | {theirs:.1f} | {ours:.1f} | {theirs / ours:.1f} |")
    return "\n".join(lines)


def processor() -> str:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 8192, 16384])
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, help="also write the table here")
    args = parser.parse_args()

    dtype = getattr(torch, args.dtype)
    models = build(dtype)
    with torch.inference_mode():
        seconds, difference = measure(models, args.contexts, args.steps, args.rounds, dtype)
    growth = seconds[args.contexts[-1], "hf_moe"] / seconds[args.contexts[0], "hf_moe"]
    report = f"""# Decoding with latent attention on the CPU

DeepSeek-V2-Lite's sizes with 2 layers, {args.dtype}, batch 1, dynamic cache, both models in turn.
`python benchmarks/mla_decode_cpu.py --dtype {args.dtype}`: median of {args.rounds} rounds of {args.steps} steps.

{table(seconds, args.contexts)}

- hf_moe at {args.contexts[-1]} takes {growth:.2f} times as long as at {args.contexts[0]}.
- Largest difference of the logits, relative to the largest logit: {difference:.1e}.
- {processor()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} at the end.
- Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}.
"""
    print(report)
    if args.out:
        args.out.write_text(report)


if __name__ == "__main__":
    main()
