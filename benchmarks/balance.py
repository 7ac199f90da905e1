"""What keeps experts busy: the same 2-layer model without any balancing and with each method, from one start.

    python benchmarks/balance.py --out benchmarks/results/balance

writes load.png (each expert's share of the text over training, layer by layer), loss.png and balance.json. The text is
the demo's grammar. Fair load is K / E of the tokens; an expert under a tenth of it counts as starved.
"""

import argparse
import json
import platform
import random
from pathlib import Path

import matplotlib
import torch
import transformers
from transformers import AutoTokenizer

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.demo import DEMO_MODEL
from hf_moe.demo.text import postcard_rows, story
from hf_moe.model.balancing import update_selection_bias
from hf_moe.version import __version__

matplotlib.use("Agg")
from matplotlib import pyplot as plt

EXPERTS, TOP_K, LAYERS = 32, 1, 2
ALONE = {"router_type": "softmax_topk", "router_aux_loss_coef": 0.0}
# Coefficients are large beside published ones: the run is short, and each method must act within it.
METHODS = {
    "none": ALONE,
    "expert loss": {**ALONE, "router_aux_loss_coef": 0.05},
    "sequence loss": {**ALONE, "seq_aux_loss_coef": 0.05},
    "device + expert loss": {
        **ALONE,
        "router_aux_loss_coef": 0.05,
        "device_aux_loss_coef": 0.05,
        "n_group": 4,
        "topk_group": 4,
    },
    "selection bias": {
        **ALONE,
        "router_type": "sigmoid_topk",
        "norm_topk_prob": True,
        "router_args": {"selection_bias": True},
        "router_bias_update_speed": 5e-3,
    },
    "expert choice": {**ALONE, "router_type": "expert_choice"},
    "hash": {**ALONE, "router_type": "hash"},
    "S-BASE": {**ALONE, "router_type": "base", "router_args": {"solver": "sinkhorn"}},
}


def batches(tokenizer, count: int, rows: int, length: int, seed: int, device: str):
    """`count` batches [rows, length] of stories and postcards, one text after another."""
    rng = random.Random(seed)
    ids = []
    while len(ids) < count * rows * length:
        text = (
            " ".join(story(rng))
            if rng.random() < 0.5
            else postcard_rows(1, False, rng.randrange(2**31))[0]["messages"][1]["content"]
        )
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids[: count * rows * length], device=device).view(count, rows, length)


def loads(indices: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """[layers, E]: each expert's tokens beside its fair share."""
    counts = torch.stack([index.flatten().bincount(minlength=EXPERTS) for index in indices]).float()
    return counts * EXPERTS / counts.sum(dim=-1, keepdim=True)


def train(fields: dict, data: torch.Tensor, vocab_size: int, device: str, learning_rate: float) -> dict:
    torch.manual_seed(0)
    config = HfMoeConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=None,
        **fields,
    )
    model = HfMoeForCausalLM(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    history = {"loss": [], "load": []}
    for batch in data:
        out = model(batch, labels=batch, output_router_logits=True)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if config.router_bias_update_speed:
            for layer, index in zip(model.model.layers, out.router_indices, strict=True):
                counts = index.flatten().bincount(minlength=EXPERTS)
                update_selection_bias(layer.mlp.gate.e_score_correction_bias, counts, config.router_bias_update_speed)
        extra = sum(getattr(config, name) * value for name, value in out.router_losses.items())
        history["loss"].append((out.loss - extra).item())
        history["load"].append(loads(out.router_indices).cpu())
    return history


def draw(results: dict[str, dict], out: Path):
    figure, axes = plt.subplots(LAYERS, len(results), figsize=(2.2 * len(results), 5), sharex=True, sharey=True)
    for column, (name, history) in enumerate(results.items()):
        share = torch.stack(history["load"]) / EXPERTS  # [steps, layers, E]
        share = share.unfold(0, 20, 10).mean(-1)
        for row in range(LAYERS):
            axes[row, column].stackplot(range(len(share)), share[:, row].T, linewidth=0)
        axes[0, column].set_title(name)
    for row in range(LAYERS):
        axes[row, 0].set_ylabel(f"layer {row}: share of tokens")
    figure.supxlabel("tens of steps")
    figure.tight_layout()
    figure.savefig(out / "load.png", dpi=110)

    figure, axis = plt.subplots(figsize=(8, 5))
    for name, history in results.items():
        loss = torch.tensor(history["loss"]).unfold(0, 20, 5).mean(-1)
        axis.plot([5 * i for i in range(len(loss))], loss, label=name)
    axis.set(xlabel="step", ylabel="cross-entropy", yscale="log")
    axis.legend()
    figure.tight_layout()
    figure.savefig(out / "loss.png", dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--learning-rate", type=float, default=5e-2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    data = batches(tokenizer, args.steps, 16, 96, seed=0, device=args.device)
    results = {
        name: train(METHODS[name], data, len(tokenizer), args.device, args.learning_rate) for name in args.methods
    }
    table = {}
    for name, history in results.items():
        load = torch.stack(history["load"][-50:]).mean(0)
        table[name] = {
            "starved_experts": (load < 0.1).sum(-1).tolist(),
            "max_load": [round(x, 2) for x in load.amax(-1).tolist()],
            "loss": round(sum(history["loss"][-50:]) / 50, 4),
        }
        print(f"{name:22s} {table[name]}")
    if len(results) > 1:
        draw(results, args.out)
    card = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "CPU"
    versions = {"hf_moe": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    setting = {"experts": EXPERTS, "top_k": TOP_K, "steps": args.steps, "learning_rate": args.learning_rate}
    report = {"device": card, "versions": versions, "setting": setting, "methods": table}
    (args.out / "balance.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
