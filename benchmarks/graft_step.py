"""A training step of a graft beside hf_moe's own architecture: the same experts, batches and losses, in the same run.

    python benchmarks/graft_step.py --out benchmarks/results/graft_step.json [--model SMOLLM2] [--tokens 8192]

Without --model, random weights in SmolLM2-135M's shape. Both are upcycled with noise to 4 experts of which 2 work, and
take the same 20 steps of SGD on random tokens, in turns, with the balance loss. Steps are timed after the first 5;
medians, and the ratio of the two. On a GPU in bfloat16 with hf_moe's kernels, on a CPU in float32.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import transformers
from hf_moe.conversion import upcycle
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_moe.version import __version__

SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
STEPS, WARM = 20, 5
ROW = 1024  # tokens


def step(model, optimizer, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds and loss of one step on ids [B, S]."""
    wait = torch.cuda.synchronize if ids.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    wait()
    return time.perf_counter() - start, loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=int, default=8192)
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    models = {}
    with tempfile.TemporaryDirectory() as aside:
        dense = args.model or Path(aside) / "dense"
        if args.model is None:
            torch.manual_seed(0)
            LlamaForCausalLM(SMOLLM2).save_pretrained(dense)
        for name, graft in (("native", False), ("graft", True)):
            made = {"experts": 4, "top_k": 2, "strategy": "noise", "graft": graft, "verify": False}
            upcycle(dense, Path(aside) / name, **made, progress=False)
            models[name] = AutoModelForCausalLM.from_pretrained(Path(aside) / name, dtype=dtype).to(device).train()
            if gpu:
                models[name].set_experts_implementation("hf_moe")
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=1e-2) for name, model in models.items()}
    rows, generator = max(1, args.tokens // ROW), torch.Generator().manual_seed(0)
    length = min(ROW, args.tokens)
    seconds, losses = {name: [] for name in models}, {name: [] for name in models}
    for number in range(STEPS):
        ids = torch.randint(0, 49152, (rows, length), generator=generator).to(device)
        for name in list(models)[:: 1 if number % 2 else -1]:
            took, loss = step(models[name], optimizers[name], ids)
            seconds[name].append(took)
            losses[name].append(loss)
    medians = {name: statistics.median(values[WARM:]) for name, values in seconds.items()}
    differences = [abs(a - b) for a, b in zip(losses["native"], losses["graft"], strict=True)]
    report = {
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "versions": {x.__name__: x.__version__ for x in (torch, transformers)} | {"hf_moe": __version__},
        "weights": args.model.name if args.model else "random",
        "dtype": str(dtype).removeprefix("torch."),
        "tokens_a_step": rows * length,
        "graft_by_native": round(medians["graft"] / medians["native"], 4),
        "largest_difference_of_losses": max(differences),
        "first_and_last_loss": [losses["graft"][0], losses["graft"][-1]],
    }
    if gpu:
        report["seconds_a_step"] = {name: round(value, 5) for name, value in medians.items()}
    print(json.dumps(report, indent=2))
    args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
