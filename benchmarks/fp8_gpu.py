"""One MoE layer's experts in FP8 beside bf16 on a Hopper card: TFLOP/s, memory, and how far from float32.

    python benchmarks/fp8_gpu.py --out benchmarks/results/fp8_gpu.json
    python benchmarks/fp8_gpu.py --out sweep.json --sweep

Our FP8 kernels, our bf16 kernels, and torchao's grouped product with a scale for each row where it is installed, all
in one run, of OLMoE's and Qwen3-30B's layers; and linear layers beside cuBLAS. FLOPs are 2 * 3 T K D I forward and
three times that forward and backward. Weights in FP8 are made once a step: what that takes stands beside
(`weights_ms`). `error` is the norm of the difference from float32 over float32's norm, of the output and of each
gradient. `kernels` is where the time goes, in milliseconds. `--sweep` times each product under other tiles, warps and
stages.
"""

import argparse
import json
from collections.abc import Callable
from itertools import product as combinations
from pathlib import Path

import torch
import transformers
import triton
from moe_layer import LAYERS, kernels, measure, milliseconds
from torch import nn

from hf_moe.kernels.formula import Formula
from hf_moe.kernels.fp8 import feed_forward, launch, quantise
from hf_moe.kernels.fp8.copies import BlockCopies, quantised
from hf_moe.kernels.fp8.linear import compute_in_fp8
from hf_moe.kernels.fp8.product import product
from hf_moe.kernels.fp8.up_projection import up_projection
from hf_moe.kernels.routing_metadata import route
from hf_moe.version import __version__

NAMES = ("OLMoE-1B-7B", "Qwen3-30B-A3B")
LINEARS = ((2048, 2048), (4096, 2048), (10944, 2048))  # attention's of both, and the dense network of DeepSeek-V2-Lite
GRADIENTS = ("x", "weights", "up", "down")
SWEEP = {
    "up": {"FLATTEN": (True,), "num_stages": (3, 4), "per_processor": (1, 2)},
    "product": {"FLATTEN": (True,), "num_stages": (3, 4, 6), "per_processor": (1, 2)},
}


class Layer:
    """Experts of a family in bfloat16, tokens routed at random, and a direction to go back from."""

    def __init__(self, name: str, tokens: int):
        experts_class, config = LAYERS[name]
        torch.manual_seed(0)
        with torch.device("cuda"):
            self.experts = experts_class(config).to(torch.bfloat16)
            for parameter in self.experts.parameters():
                nn.init.normal_(parameter, std=0.02)
            x, self.direction = torch.randn(2, tokens, config.hidden_size, dtype=torch.bfloat16)
            scores = torch.rand(tokens, self.experts.num_experts)
        weights, self.index = scores.softmax(-1).topk(config.num_experts_per_tok)
        self.x, self.weights = x.requires_grad_(), weights.requires_grad_()
        self.inner = self.experts.down_proj.shape[2]
        self.flops = 2 * 3 * self.index.numel() * config.hidden_size * self.inner

    @property
    def given(self) -> tuple:
        """For `measure` and `kernels`, behind the experts."""
        return self.x, self.index, self.weights, self.direction

    def results(self, experts: Callable, dtype: torch.dtype) -> list[torch.Tensor]:
        """The output and the gradients of GRADIENTS."""
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (self.x, self.weights)]
        output = experts(leaves[0], self.index, leaves[1])
        leaves += [self.experts.gate_up_proj, self.experts.down_proj]
        return [output, *torch.autograd.grad(output, leaves, self.direction.to(dtype))]


def distances(results: list[torch.Tensor], expected: list[torch.Tensor]) -> dict[str, float]:
    pairs = zip(("output", *GRADIENTS), results, expected, strict=True)
    return {name: round(((x.float() - y).norm() / y.norm()).item(), 5) for name, x, y in pairs}


def peak_mib(function: Callable[[], object]) -> float:
    """What one forward and backward take beside what lay there before."""
    function()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def ours(layer: Layer, name: str) -> dict:
    """One of our implementations."""
    experts = layer.experts
    experts.config._experts_implementation = name
    leaves = [layer.x, layer.weights, *experts.parameters()]

    def both():
        torch.autograd.grad(experts(layer.x, layer.index, layer.weights), leaves, layer.direction)

    row = measure(experts, *layer.given, layer.flops)
    return row | {"peak_mib": peak_mib(both), "kernels": kernels(experts, *layer.given)}


class TorchAo(nn.Module):
    """The layer by torchao's grouped product; rows sorted and filled up to 16 an expert beforehand, which costs it
    nothing here."""

    def __init__(self, layer: Layer):
        super().__init__()
        from torchao.prototype.moe_training import fp8_grouped_mm

        self.multiply = fp8_grouped_mm._to_fp8_rowwise_then_scaled_grouped_mm
        self.gate_up_proj, self.down_proj = layer.experts.gate_up_proj, layer.experts.down_proj
        rows, ends = [], [0]
        for expert in range(len(self.down_proj)):
            chosen = (layer.index.flatten() == expert).nonzero().flatten()
            rows.append(nn.functional.pad(chosen, (0, -len(chosen) % 16), value=-1))
            ends.append(ends[-1] + len(rows[-1]))
        self.slots = torch.cat(rows)
        self.ends = torch.tensor(ends[1:], dtype=torch.int32, device="cuda")

    def grouped(self, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self.multiply(rows, weight.mT, self.ends, pad_token_groups_for_grouped_mm=False)

    def forward(self, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        slots = self.slots.clamp(min=0)
        tokens = slots // index.shape[1]
        gate, up = self.grouped(x[tokens], self.gate_up_proj).chunk(2, -1)
        rows = self.grouped(nn.functional.silu(gate) * up, self.down_proj)
        scale = weights.flatten()[slots].masked_fill(self.slots < 0, 0).unsqueeze(1)
        return torch.zeros_like(x).index_add(0, tokens, (rows * scale).to(x.dtype))


def torchao(layer: Layer, expected: list[torch.Tensor]) -> dict | str:
    """The peer's row, or why there is none."""
    try:
        experts = TorchAo(layer)
        row = measure(experts, *layer.given, layer.flops)
        return row | {"error": distances(layer.results(experts, torch.bfloat16), expected)}
    except (ImportError, AttributeError, AssertionError, RuntimeError) as error:  # a prototype, which may go
        return f"not measured: {' '.join(str(error).split())[:200]}"


def compare(name: str, tokens: int) -> dict:
    layer = Layer(name, tokens)
    experts = layer.experts
    experts.config._experts_implementation = "hf_moe"
    exact = layer.experts.float()
    expected = [x.detach().clone() for x in layer.results(exact, torch.float32)]
    layer.experts = experts.to(torch.bfloat16)
    result = {"bf16": ours(layer, "hf_moe")}
    result["bf16"]["error"] = distances(layer.results(experts, torch.bfloat16), expected)
    held = BlockCopies(experts.parameters())
    held.begin()
    result["fp8"] = ours(layer, "fp8")
    result["fp8"]["error"] = distances(layer.results(experts, torch.bfloat16), expected)
    held.end()
    result["fp8"]["weights_ms"] = round(milliseconds(lambda: [quantised(x) for x in experts.parameters()]), 3)
    result["torchao"] = torchao(layer, expected)
    for part in ("forward", "forward_backward"):
        times = [result[kind][f"{part}_ms"] for kind in ("bf16", "fp8")]
        result[f"{part}_speedup"] = round(times[0] / times[1], 3)
    return result


def linear_layer(size: tuple[int, int], tokens: int) -> dict[str, float]:
    """Milliseconds of a linear layer [out, in] forward and backward, in FP8 beside cuBLAS in bf16."""
    layer = nn.Linear(*reversed(size), bias=False, dtype=torch.bfloat16, device="cuda")
    x, direction = (torch.randn(tokens, n, dtype=torch.bfloat16, device="cuda") for n in reversed(size))
    leaves, row = [x.requires_grad_(), layer.weight], {}
    held = BlockCopies([layer.weight])
    held.begin()
    for name in ("bf16", "fp8"):
        if name == "fp8":
            compute_in_fp8(layer)
        row[f"{name}_forward_ms"] = round(milliseconds(lambda: layer(x)), 3)
        both = milliseconds(lambda: torch.autograd.grad(layer(x), leaves, direction))
        row[f"{name}_forward_backward_ms"] = round(both, 3)
    held.end()
    return row | {"speedup": round(row["bf16_forward_backward_ms"] / row["fp8_forward_backward_ms"], 3)}


def products(name: str, tokens: int) -> dict[str, list[tuple[str, Callable, float]]]:
    """Kernel -> the launches of it in a layer: what each is, and its FLOPs."""
    layer = Layer(name, tokens)
    up, down = (quantised(x) for x in (layer.experts.gate_up_proj, layer.experts.down_proj))
    of = feed_forward.layer(layer.index.shape[1], layer.experts.down_proj, Formula("silu"))
    routing = route(layer.index, layer.weights, of.num_experts, of.tile, skip_zero=False)
    x, dtype = quantise.tiles_of(layer.x.detach()), torch.bfloat16
    rest = (None, None, dtype, of, routing, True, False)
    _, activated, _ = up_projection(x, up[0], *rest)
    wide = quantise.tiles_of(torch.randn(len(activated.codes), 2 * layer.inner, device="cuda", dtype=dtype))
    one = layer.flops / 3  # of a product with one of an expert's three matrices
    return {
        "up": [("up", lambda: up_projection(x, up[0], *rest), 2 * one)],
        "product": [
            ("down", lambda: product(activated, down[0], dtype, of, routing), one),
            ("to the activations", lambda: product(x, down[1], dtype, of, routing, gathered=True), one),
            ("to x", lambda: product(wide, up[1], dtype, of, routing), 2 * one),
        ],
    }


def options(kernel: str) -> list[dict]:
    """What a sweep tries."""
    return [dict(zip(SWEEP[kernel], values, strict=True)) for values in combinations(*SWEEP[kernel].values())]


def sweep(name: str, tokens: int) -> dict:
    """TFLOP/s of every launch under each of the options, the best of a kernel first."""
    found = {}
    for kernel, launches in products(name, tokens).items():
        before, rows = launch.LARGE[kernel], []
        for chosen in options(kernel):
            launch.LARGE[kernel] = before | chosen
            row = {"options": chosen}
            for what, run, flops in launches:
                try:
                    row[what] = round(flops / triton.testing.do_bench(run, 10, 60, return_mode="median") / 1e9, 1)
                except triton.runtime.errors.OutOfResources as error:
                    row[what] = str(error)[:80]
            print(name, kernel, row, flush=True)
            rows.append(row)
        launch.LARGE[kernel] = before
        found[kernel] = rows
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--layers", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    modules = (torch, triton, transformers)
    versions = {module.__name__: module.__version__ for module in modules} | {"hf_moe": __version__}
    report = {"device": torch.cuda.get_device_name(), "versions": versions, "tokens": args.tokens, "results": {}}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name in args.layers:
        report["results"][name] = result = (sweep if args.sweep else compare)(name, args.tokens)
        print(name, json.dumps(result), flush=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not args.sweep:
        report["linear layers"] = {"x".join(map(str, size)): linear_layer(size, args.tokens) for size in LINEARS}
        print(json.dumps(report["linear layers"]), flush=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
