"""One MoE layer's experts on a GPU: TFLOP/s and saved activations, beside Transformers' and a batched-GEMM ceiling.

    python benchmarks/moe_layer.py --out benchmarks/results/moe_layer.json

FLOPs are 2 * 3 T K D I forward and three times that forward and backward. The ceiling is what torch.bmm needs for the
same products with tokens spread evenly, and nothing else. SonicMoE is measured where it is installed. Saved are the
tensors kept for the backward, without inputs and parameters. Medians, bfloat16, random tokens routed at random.
`kernels` is where the time of our forward and backward goes: milliseconds of each kernel, by torch's profiler.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
import triton
from transformers import GptOssConfig, OlmoeConfig, Qwen3MoeConfig
from transformers.integrations.sonicmoe import is_sonicmoe_loadable
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from hf_moe.version import __version__

SONIC = ["sonicmoe"] if is_sonicmoe_loadable() else []
LAYERS = {
    "OLMoE-1B-7B": (
        OlmoeExperts,
        OlmoeConfig(hidden_size=2048, intermediate_size=1024, num_experts=64, num_experts_per_tok=8),
    ),
    "Qwen3-30B-A3B": (
        Qwen3MoeExperts,
        Qwen3MoeConfig(hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8),
    ),
    # Interleaved, clamped and shifted gate, biases, transposed weights.
    "gpt-oss-20b": (
        GptOssExperts,
        GptOssConfig(hidden_size=2880, intermediate_size=2880, num_local_experts=32, num_experts_per_tok=4),
    ),
}


def milliseconds(function) -> float:
    return triton.testing.do_bench(function, warmup=50, rep=300, return_mode="median")


def saved_mib(function, known: list[torch.Tensor]) -> float:
    """MiB that autograd keeps while `function` runs, each storage once, without the `known` tensors."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    kept = {tensor.untyped_storage().data_ptr() for tensor in known}
    del output
    return sum(size for pointer, size in storages.items() if pointer not in kept) / 2**20


def measure(experts, x, index, weights, direction, flops: float) -> dict[str, float]:
    leaves = [x, weights, *experts.parameters()]

    def forward():
        with torch.no_grad():
            return experts(x, index, weights)

    def both():
        return torch.autograd.grad(experts(x, index, weights), leaves, direction)

    saved = saved_mib(lambda: experts(x, index, weights), [*leaves, index])
    forward_ms, both_ms = milliseconds(forward), milliseconds(both)
    return {
        "forward_tflops": round(flops / forward_ms / 1e9, 1),
        "forward_backward_tflops": round(3 * flops / both_ms / 1e9, 1),
        "forward_ms": round(forward_ms, 3),
        "forward_backward_ms": round(both_ms, 3),
        "saved_mib": round(saved, 1),
    }


def kernels(experts, x, index, weights, direction, times: int = 10) -> dict[str, float]:
    """Milliseconds of each kernel in one forward and backward, those that take the most first."""
    leaves = [x, weights, *experts.parameters()]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(times):
            torch.autograd.grad(experts(x, index, weights), leaves, direction)
        torch.cuda.synchronize()
    took = {event.key[:80]: event.device_time_total / 1000 / times for event in profile.key_averages()}
    return {name: round(ms, 3) for name, ms in sorted(took.items(), key=lambda item: -item[1]) if ms > 0.005}


def ceiling(tokens: int, D: int, inner: int, E: int, K: int, flops: float) -> dict[str, float]:
    """The products alone: x W_up^T and A W_down^T, then both gradients of each."""
    x, hidden, activated = (
        torch.randn(E, tokens * K // E, width, device="cuda", dtype=torch.bfloat16) for width in (D, 2 * inner, inner)
    )
    up, down = (torch.randn(E, *shape, device="cuda", dtype=torch.bfloat16) for shape in ((2 * inner, D), (D, inner)))

    def forward():
        torch.bmm(x, up.mT)
        torch.bmm(activated, down.mT)

    def both():
        forward()
        torch.bmm(x, down)
        torch.bmm(x.mT, activated)
        torch.bmm(hidden, up)
        torch.bmm(hidden.mT, x)

    return {
        "forward_tflops": round(flops / milliseconds(forward) / 1e9, 1),
        "forward_backward_tflops": round(3 * flops / milliseconds(both) / 1e9, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--implementations", nargs="+", default=["hf_moe", "grouped_mm", *SONIC])
    args = parser.parse_args()
    modules = (torch, triton, transformers)
    versions = {module.__name__: module.__version__ for module in modules} | {"hf_moe": __version__}
    results = {}
    report = {"device": torch.cuda.get_device_name(), "versions": versions, "tokens": args.tokens, "results": results}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name, (experts_class, config) in LAYERS.items():
        torch.manual_seed(0)
        with torch.device("cuda"):
            experts = experts_class(config).to(torch.bfloat16)
            for parameter in experts.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
            x, direction = torch.randn(2, args.tokens, config.hidden_size, dtype=torch.bfloat16)
            scores = torch.rand(args.tokens, experts.num_experts)
        x.requires_grad_()
        weights, index = scores.softmax(-1).topk(config.num_experts_per_tok)
        weights.requires_grad_()
        inner = experts.down_proj.numel() // (experts.num_experts * config.hidden_size)
        sizes = (config.hidden_size, inner, experts.num_experts, config.num_experts_per_tok)
        flops = 2 * 3 * args.tokens * sizes[3] * sizes[0] * sizes[1]
        results[name] = {"ceiling": ceiling(args.tokens, *sizes, flops)}
        print(name, "ceiling", results[name]["ceiling"], flush=True)
        for implementation in args.implementations:
            experts.config._experts_implementation = implementation
            results[name][implementation] = row = measure(experts, x, index, weights, direction, flops)
            print(name, implementation, row, flush=True)
            if implementation == "hf_moe":
                results[name]["kernels"] = kernels(experts, x, index, weights, direction)
            args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
