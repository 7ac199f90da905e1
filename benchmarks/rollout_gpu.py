"""GRPO's rollouts on a GPU: TRL's trainer with Transformers' OLMoE, beside ours.

    python benchmarks/rollout_gpu.py --out benchmarks/results/rollout_gpu.json

The shape of OLMoE-1B-7B in bfloat16 with random weights, one model at a time. Each trainer writes the texts of a step
by its own method: 16 prompts, 8 samples of 256 tokens each at temperature 1, all in one batch. Weights are changed in
place before each rollout but the first, which loads and tunes; the times are those of the others. All that a rollout
does is in them, a recording too.

That a recorded step sees weights that were changed in place: the same batch is written greedily before and after, by
one recording, and each time compared with the path that records nothing. Rows whose texts differ must do so at a tie
(greedy_texts.py). Exits with 1 where one doesn't, or where the change changed no text.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
import trl
from datasets import Dataset
from greedy_texts import BOUNDS, compared
from olmoe import SHAPES, build, hf_moe_model, shape, transformers_model
from transformers import AutoTokenizer, PreTrainedModel
from trl import GRPOConfig, GRPOTrainer

from hf_moe import MoeGRPOConfig, MoeGRPOTrainer
from hf_moe.demo import DEMO_MODEL
from hf_moe.model.decoding import KEPT
from hf_moe.version import __version__

PEERS = {
    "trl": (GRPOTrainer, GRPOConfig, transformers_model),
    "hf_moe": (MoeGRPOTrainer, MoeGRPOConfig, hf_moe_model),
}
CHANGE = 0.3  # of a weight's standard deviation


def constant(completions, **columns) -> list[float]:
    return [1.0] * len(completions)


def trainer_of(name: str, model: PreTrainedModel, args: argparse.Namespace, folder: str) -> GRPOTrainer:
    trainer, config, _ = PEERS[name]
    settings = {"num_generations": args.generations, "max_completion_length": args.new, "temperature": 1.0}
    settings |= {"per_device_train_batch_size": args.prompts * args.generations, "report_to": "none"}
    settings |= {"use_cpu": args.device == "cpu", "bf16": False, "save_strategy": "no", "output_dir": folder}
    return trainer(
        model=model,
        reward_funcs=constant,
        args=config(**settings),
        train_dataset=Dataset.from_list([{"prompt": "a"}] * args.prompts),
        processing_class=AutoTokenizer.from_pretrained(DEMO_MODEL),
    )


@torch.no_grad()
def change(model: PreTrainedModel, seed: int) -> None:
    """Move all weights in place, as an optimizer does."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for weight in model.parameters():
        noise = torch.empty_like(weight).normal_(generator=generator)
        weight.addcmul_(noise, CHANGE * weight.float().std(correction=0).to(weight))


def rollouts(trainer: GRPOTrainer, args: argparse.Namespace) -> dict:
    """Seconds and tokens of each rollout but the first."""
    generator, times, counts = torch.Generator().manual_seed(1), [], []
    prompts = torch.randint(5, args.vocabulary, (args.prompts, args.context), generator=generator)
    prompts = prompts.repeat_interleave(args.generations, dim=0).tolist()
    trainer.model.train()
    for number in range(1 + args.rounds):
        if number:
            change(trainer.model, number)
        synchronize(args.device)
        start = time.perf_counter()
        texts, _ = trainer._generate_single_turn(prompts, None, {}, args.generations)
        synchronize(args.device)
        times.append(time.perf_counter() - start)
        counts.append(sum(map(len, texts)))
    rates = [count / seconds for count, seconds in zip(counts[1:], times[1:], strict=True)]
    row = {"seconds": [round(x, 3) for x in times[1:]], "tokens": counts[1:]}
    return row | {"tokens_per_second": round(statistics.median(rates), 1)}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def replays(model: PreTrainedModel, args: argparse.Namespace) -> dict:
    """Greedy texts before and after a change in place, by one recording and by none."""
    generator, rows = torch.Generator().manual_seed(2), args.prompts * args.generations
    ids = torch.randint(5, args.vocabulary, (rows, args.context), generator=generator).to(model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
    inputs |= {"max_new_tokens": min(args.new, 32)}
    model.eval()
    steps, texts, ties, failures = [], [], 0, []
    for seed in (None, 0):
        if seed is not None:
            change(model, seed)
        texts.append(model.generate(**inputs))
        steps.append(KEPT[model].step if model in KEPT else None)
        plain = model.generate(**inputs, disable_compile=True)
        tied, failed = compared(model, texts[-1], plain, inputs["attention_mask"])
        ties, failures = ties + tied, failures + failed
    changed = int((texts[0] != texts[1]).any(dim=1).sum())
    if not changed:
        failures.append("the change changed no text")
    if args.device == "cuda" and (steps[0] is None or steps[0] is not steps[1]):
        failures.append("the second text was not written by the recording of the first")
    row = {"rows": rows, "recorded": steps[0] is not None, "changed_texts": changed, "ties": ties}
    return row | {"bound_of_ties": BOUNDS[model.dtype], "failures": failures}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="olmoe-1b-7b")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    config = shape(args.shape)
    args.vocabulary = config.vocab_size
    versions = {"hf_moe": __version__, "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "trl": trl.__version__}
    report = {"device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu", "versions": versions}
    names = ("shape", "prompts", "generations", "context", "new")
    report |= {name: getattr(args, name) for name in names} | {"results": {}}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name, (_, _, make) in PEERS.items():
        model = build(make, config, args.device, torch.bfloat16)
        with tempfile.TemporaryDirectory() as folder:
            report["results"][name] = rollouts(trainer_of(name, model, args, folder), args)
        if name == "hf_moe":
            report["replay"] = replays(model, args)
        print(f"{name:8s} {report['results'][name]}", flush=True)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    speeds = {name: row["tokens_per_second"] for name, row in report["results"].items()}
    report["speedup"] = round(speeds["hf_moe"] / speeds["trl"], 2)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"speedup  {report['speedup']}\nreplay   {report['replay']}")
    sys.exit(1 if report["replay"]["failures"] else 0)


if __name__ == "__main__":
    main()
