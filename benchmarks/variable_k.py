"""What a training step costs where tokens have different numbers of experts, beside the same number for each.

    python benchmarks/variable_k.py --out benchmarks/results/variable_k.json

A decoder with OLMoE-1B-7B's layers, forward and backward, bfloat16, random tokens. The router top_p
has slots for 8 experts and fills them until the probabilities sum to p; beside it softmax_topk with K experts for each
token, one run for each whole K. `expected_ms` is the line between the two K around the measured
mean; `over_expected` is the step's time divided by it. Medians.
"""

import argparse
import json
from pathlib import Path

import torch
import transformers
import triton

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.routers import captured, find_routers
from hf_moe.version import __version__

SLOTS = 8
SHARES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)


def build(layers: int, **changes) -> HfMoeForCausalLM:
    config = HfMoeConfig.from_preset("olmoe-1b-7b", num_hidden_layers=layers, layer_types=None, mlp_layer_types=None)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = HfMoeForCausalLM(config).to(torch.bfloat16)
    model.set_experts_implementation("hf_moe")
    for layer in model.model.layers:  # scores as uneven as a trained router's
        layer.mlp.gate.weight.data.mul_(10)
    return model.train()


def step_ms(model: HfMoeForCausalLM, ids: torch.Tensor) -> float:
    def step():
        model.zero_grad()
        model.model(ids, use_cache=False).last_hidden_state.float().square().mean().backward()

    return triton.testing.do_bench(step, warmup=200, rep=1000, return_mode="median")


def mean_k(model: HfMoeForCausalLM, ids: torch.Tensor) -> float:
    with captured(find_routers(model), SLOTS) as routings, torch.no_grad():
        model.model(ids, use_cache=False)
    return sum((x.index_SK < x.experts).sum().item() / len(x.logits_TE) for x in routings.values()) / len(routings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ids = torch.randint(0, 50000, (args.tokens // 4096, 4096), device="cuda")

    fixed = {}
    for top_k in range(1, SLOTS + 1):
        model = build(args.layers, num_experts_per_tok=top_k)
        fixed[top_k] = step_ms(model, ids)
        del model
    rows = []
    for share in SHARES:
        model = build(args.layers, num_experts_per_tok=SLOTS, router_type="top_p", router_args={"p": share})
        mean, taken = mean_k(model, ids), step_ms(model, ids)
        low = min(int(mean), SLOTS - 1)
        expected = fixed[low] + (mean - low) * (fixed[low + 1] - fixed[low])
        rows.append({"p": share, "mean_k": round(mean, 3), "ms": round(taken, 3), "expected_ms": round(expected, 3)})
        rows[-1]["over_expected"] = round(taken / expected, 3)
        print(rows[-1])
        del model
    report = {
        "card": torch.cuda.get_device_name(),
        "versions": {
            "hf_moe": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "triton": triton.__version__,
        },
        "layers": args.layers,
        "tokens": args.tokens,
        "fixed_k_ms": {str(top_k): round(value, 3) for top_k, value in fixed.items()},
        "top_p": rows,
    }
    print(json.dumps(report, indent=2))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
