"""SmolLM2-135M upcycled by each strategy, then trained at several learning rates by `smollm2-135m/continue`.

    python benchmarks/upcycling_training_gpu.py SMOLLM2 --train train.jsonl --val val.jsonl --work DIR \
        --out benchmarks/results/upcycling_training.json
    python benchmarks/upcycling_training_gpu.py --table benchmarks/results/upcycling_training.json

The recipe as shipped, but for what all runs share: how many tokens, the batch, and that the card is shared by several
runs at a time, so that only losses are compared, no times. Held-out loss is in nats a token, before training, where
the recipe looks whether the rate is too high, halfway and at the end; the dense model trains beside its mixtures. A
run that fails or stops says why.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import torch

HF_MOE = str(Path(sys.executable).with_name("hf-moe"))
EXPERTS = "--experts 4 --top-k 2"
# What `hf-moe upcycle` is told; the dense model is None.
STRATEGIES = {
    "dense": None,
    "copy": EXPERTS,
    "noise, 0.05 std": f"{EXPERTS} --strategy noise",
    "drop, r = 0.1": f"{EXPERTS} --strategy drop --drop-ratio 0.1",
    "drop, r = 0.5": f"{EXPERTS} --strategy drop --drop-ratio 0.5",
    "granular, G = 4": f"{EXPERTS} --strategy granular --granularity 4",
    "shared, 1 added": "--experts 4 --top-k 1 --strategy shared",
    "router from zero": f"{EXPERTS} --router-init zero",
}
RATE = 5e-4  # at which the strategies are compared
RATES = {"dense": (1e-4, 2e-3), "copy": (1e-4, 1e-3, 2e-3, 1.18e-2)}
DENSE = "--router_aux_loss_coef 0 --router_z_loss_coef 0"  # it has no router


def command(*words: str) -> str | None:
    """Run it; what it said last where it failed."""
    run = subprocess.run(words, capture_output=True, text=True)
    said = [line for line in run.stderr.splitlines() if line.startswith("hf-moe: ")]
    return None if run.returncode == 0 else (said or [f"exit code {run.returncode}"])[-1]


def trained(name: str, rate: float, args: argparse.Namespace) -> dict:
    """One run: its held-out losses by step."""
    model = args.dense if STRATEGIES[name] is None else str(args.work / name.replace(" ", "_"))
    output = args.work / f"{Path(model).name}-{rate:g}"
    steps = round(args.tokens / args.batch)
    given = f"{args.recipe} --model_name_or_path {model} --train_data {args.train} --eval_data {args.val} "
    given += f"--output_dir {output} --train_tokens {args.tokens} --batch_tokens {args.batch} --learning_rate {rate} "
    given += f"--eval_strategy steps --eval_steps {max(1, steps // 2)} --save_strategy no "
    given += DENSE if STRATEGIES[name] is None else ""
    failed = command(HF_MOE, "train", *given.split())
    state = output / "trainer_state.json"
    log = json.loads(state.read_text())["log_history"] if state.is_file() else []
    losses = {entry["step"]: round(entry["eval_loss"], 4) for entry in log if "eval_loss" in entry}
    row = {"strategy": name, "learning_rate": rate, "tokens": args.tokens, "held_out_loss": losses, "failed": failed}
    print(json.dumps(row), flush=True)
    return row


def table(report: dict) -> str:
    done = [row for row in report["runs"] if not row["failed"]]
    steps = sorted({int(step) for row in done for step in row["held_out_loss"]})
    lines = [
        "# Upcycled and trained on: SmolLM2-135M to 4 experts of which 2 work",
        "",
        f"Held-out loss, nats a token, by `hf-moe train {report['recipe']}` on English documentation, dictionaries "
        f"and books, {report['batch']:,} tokens a step.",
        "",
        f"| start | learning rate | tokens, M | {' | '.join(f'step {step}' for step in steps)} |",
        f"|---|---:|---:|{'---:|' * len(steps)}",
    ]
    for row in report["runs"]:
        losses = [row["held_out_loss"].get(str(step)) for step in steps]
        said = [row["failed"]] if row["failed"] else ["" if loss is None else f"{loss:.3f}" for loss in losses]
        start = f"| {row['strategy']} | {row['learning_rate']:g} | {row['tokens'] / 1e6:.2f} |"
        lines.append(f"{start} {' | '.join(said)} |")
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return "\n".join([*lines, "", f"{report['device']}; {versions}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", nargs="?", help="folder of SmolLM2-135M")
    parser.add_argument("--train", help="JSON lines with a column text")
    parser.add_argument("--val", help="the same, held out")
    parser.add_argument("--work", type=Path, help="folder for the models")
    parser.add_argument("--recipe", default="smollm2-135m/continue")
    parser.add_argument("--tokens", type=float, default=393216)
    parser.add_argument("--batch", type=int, default=16384)
    parser.add_argument("--together", type=int, default=4, help="runs at a time")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="write the table of a report, and measure nothing")
    args = parser.parse_args()
    if args.table is None:
        args.work.mkdir(parents=True, exist_ok=True)
        runs = [(name, RATE) for name in args.strategies]
        runs += [(name, rate) for name, rates in RATES.items() if name in args.strategies for rate in rates]
        with ThreadPoolExecutor(args.together) as pool:
            made = {name: STRATEGIES[name] for name in args.strategies if STRATEGIES[name] is not None}
            folders = [str(args.work / name.replace(" ", "_")) for name in made]
            failed = pool.map(
                lambda folder, options: command(
                    HF_MOE, "upcycle", args.dense, folder, *options.split(), "--no-verify"
                ),
                folders,
                made.values(),
            )
            for folder, error in zip(folders, failed, strict=True):
                if error is not None:
                    raise SystemExit(f"{folder}: {error}")
            report = {
                "device": torch.cuda.get_device_name(),
                "versions": {name: version(name) for name in ("torch", "transformers", "trl", "hf_moe")},
                "recipe": args.recipe,
                "batch": args.batch,
                "runs": list(pool.map(lambda run: trained(*run, args), runs)),
            }
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        args.table = args.out
    args.table.with_suffix(".md").write_text(table(json.loads(args.table.read_text())))


if __name__ == "__main__":
    main()
