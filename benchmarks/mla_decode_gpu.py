"""Tokens a second through generate() on a GPU: hf_moe's latent attention beside Transformers' DeepSeek-V2.

    python benchmarks/mla_decode_gpu.py --out benchmarks/results/mla_decode_gpu.json

The shape of DeepSeek-V2-Lite (15.7B parameters) in bf16 with random weights, the same for both models, one model at a
time. Decoding speed is that of `new` tokens after a prefill: the time of generating 1 + new tokens less the time of
generating 1, medians of several rounds, after a first text that loads and records what is needed. Both models decode
the way `generate()` does by itself.

`floor` is what the card's memory allows hf_moe's model: the bytes that a step must read (the weights of the experts
that the rows chose, counted; all other weights; the cache) at the speed of a large copy in the same run.
"""

import argparse
import gc
import json
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.model.modeling_hf_moe import HfMoeExperts
from hf_moe.model.router import HfMoeRouter
from hf_moe.sizes.counts import sizes
from hf_moe.version import __version__

CASES = [(1, 128), (1, 4096), (1, 32768), (16, 128), (16, 4096)]  # batch, context


def hf_moe_model(layers: int):
    return HfMoeForCausalLM(HfMoeConfig.from_preset("deepseek-v2-lite", num_hidden_layers=layers))


def transformers_model(layers: int):
    ours = HfMoeConfig.from_preset("deepseek-v2-lite", num_hidden_layers=layers)
    names = ["vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"]
    names += ["num_attention_heads", "n_shared_experts", "num_experts_per_tok", "q_lora_rank", "kv_lora_rank"]
    names += ["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rms_norm_eps", "max_position_embeddings"]
    names += ["rope_parameters", "initializer_range"]
    fields = {name: getattr(ours, name) for name in names}
    return DeepseekV2ForCausalLM(
        DeepseekV2Config(**fields, n_routed_experts=ours.num_experts, first_k_dense_replace=1)
    )


MODELS = {"hf_moe": hf_moe_model, "transformers": transformers_model}


def build(name: str, layers: int):
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = MODELS[name](layers).eval()
    torch.set_default_dtype(torch.float32)
    return model


def seconds(model, ids: torch.Tensor, new: int, **options) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False, **options
    )
    torch.cuda.synchronize()
    return time.perf_counter() - start


def decode_speed(model, batch: int, context: int, new: int, rounds: int, **options) -> dict[str, float]:
    ids = torch.randint(3, model.config.vocab_size, (batch, context), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    seconds(model, ids, 2, **options)  # warm-up
    prefill, both = [], []
    for _ in range(rounds):
        prefill.append(seconds(model, ids, 1, **options))
        both.append(seconds(model, ids, 1 + new, **options))
    decode = statistics.median(both) - statistics.median(prefill)
    return {
        "tokens_per_second": round(batch * new / decode, 1),
        "prefill_seconds": round(statistics.median(prefill), 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }


def copy_speed() -> float:
    """Bytes a second that a large copy reads and writes."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    target.copy_(source)
    start.record()
    for _ in range(10):
        target.copy_(source)
    end.record()
    torch.cuda.synchronize()
    return 20 * source.numel() / (start.elapsed_time(end) / 1000)


def bytes_of_a_step(model, batch: int, context: int, new: int) -> float:
    """Bytes that a decoding step of hf_moe's `model` can't but read, experts as chosen on the way."""
    distinct = []

    def count(router, inputs, outputs):
        if len(inputs[0]) == batch:  # a step, not the prompt
            distinct.append(outputs[2].unique().numel())

    routers = [module for module in model.modules() if isinstance(module, HfMoeRouter)]
    hooks = [router.register_forward_hook(count) for router in routers]
    ids = torch.randint(3, model.config.vocab_size, (batch, context), device="cuda")
    seconds(model, ids, 9, disable_compile=True)
    for hook in hooks:
        hook.remove()
    experts = [module for module in model.modules() if isinstance(module, HfMoeExperts)]
    one = sum(x.nbytes for x in experts[0].parameters()) / model.config.num_experts
    routed = sum(x.nbytes for module in experts for x in module.parameters())
    others = sum(x.nbytes for x in model.parameters()) - routed - model.get_input_embeddings().weight.nbytes
    cached = sizes(model.config)["kv_cache_bytes_per_token"]
    chosen = statistics.mean(distinct) * len(experts)
    return chosen * one + others + batch * (context + new / 2) * cached


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=27)
    args = parser.parse_args()
    results, bandwidth = {}, copy_speed()
    for name in MODELS:
        model = build(name, args.layers)
        for batch, context in CASES:
            results[f"{name}, batch {batch}, context {context}"] = row = decode_speed(
                model, batch, context, args.new, args.rounds
            )
            if name == "hf_moe":
                bound = bandwidth / bytes_of_a_step(model, batch, context, args.new) * batch
                row["floor_tokens_per_second"] = round(bound, 1)
            print(f"{name:14s} batch {batch:3d} context {context:6d}: {row}", flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    ratios = {}
    for batch, context in CASES:
        key = f"batch {batch}, context {context}"
        ours, theirs = (results[f"{name}, {key}"]["tokens_per_second"] for name in MODELS)
        ratios[key] = round(ours / theirs, 2)
    versions = {"hf_moe": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    report = {"device": torch.cuda.get_device_name(), "versions": versions, "layers": args.layers, "new": args.new}
    report["copy_terabytes_per_second"] = round(bandwidth / 1e12, 2)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report | {"results": results, "ratios": ratios}, indent=2) + "\n")
    print(ratios)


if __name__ == "__main__":
    main()
