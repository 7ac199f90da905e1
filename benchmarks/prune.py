"""Six of eight experts: chosen by each measure, merged, and trained again by the model that they are from.

    python benchmarks/prune.py --model SMOLLM2 --data TEXTS --work DIR --out benchmarks/results/prune.json

TEXTS is a folder of .txt files, one a domain, whose documents end with <|endoftext|>. A dense model is upcycled to 8
experts, 2 a token, and trained on as much of each domain (`smollm2-135m/continue`); then 2 experts of each layer go,
by `hf_moe.conversion.prune` on texts drawn from those it was trained on. "reap, distilled" is the model pruned by
REAP, its routers and experts trained for --distil-steps with its parent as the teacher (`smollm2-135m/distil`); the
parent is trained no further, so that this gains from more training, too. Without a GPU the recipes are those of
`tiny`.

Copied experts come to differ in training alone. With --strategy drop half of each one's neurons are drawn anew
(Drop-Upcycling, https://arxiv.org/abs/2502.19261), so that they differ from the start. With --balance the load is more
even, or less, than the recipe's loss makes it: what frequency tells depends on that.

A seed is an experiment of its own: router, order of the rows, calibration texts and random choice come from it. With
one mixture for all of them, three calibrations would choose nearly the same experts, and count as three.

Held-out loss is in nats a token, in float32, each domain's by itself and their mean; no piece of text is both trained
on and held out. A .md with the tables comes to stand beside the .json. Both are written after each seed, and the same
command goes on behind the seeds that are there, on another machine, too. It needs hf_moe[train,merge].
"""

import argparse
import gc
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from hf_moe.conversion import prune, upcycle
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from hf_moe import train
from hf_moe.staging import written_aside
from hf_moe.texts import texts

EXPERTS, TOP_K, KEPT = 8, 2, 6
END = "<|endoftext|>"
PIECE = 1500  # characters of a row, at most
OF_DOMAIN = 1_200_000  # characters that are trained on; of the larger domains, as much of all their parts
HELD_OUT = 16  # one of so many pieces is
CALIBRATION = {"pieces": 12, "characters": 300}  # of each domain
SEEN = 4096  # tokens of them, at most
RATE = 2e-4  # of the distillation, between what the mixture was trained with first and last


class Setting(NamedTuple):
    """recipes: the folder that `continue` and `distil` are from. length: tokens of a row. rows: of a step. held_out:
    rows of each domain that losses are measured on."""

    recipes: str
    length: int
    rows: int
    held_out: int


SETTINGS = {"cuda": Setting("smollm2-135m", 512, 64, 16), "cpu": Setting("tiny", 64, 8, 4)}
# Name -> what `prune` is told.
PRUNED = {
    "reap": {"by": "reap"},
    "frequency": {"by": "frequency"},
    "output": {"by": "output"},
    "random": {"by": "random"},
    "merged by reap": {"by": "reap", "merge": True},
}
PARENT, DISTILLED = "all 8 experts", "reap, distilled"
PACKAGES = ("hf_moe", "torch", "transformers", "trl", "datasets", "scipy")


def pieces(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A domain's documents, cut."""
    documents = "".join(texts(str(path), tokenizer)).split(END)
    cut = [text[i : i + PIECE].strip() for text in documents for i in range(0, len(text), PIECE)]
    return [piece for piece in cut if piece]


def write_rows(path: Path, rows: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def domains_of(data: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[list[str], list[str]]]:
    """Name of a domain -> the pieces to train on, and those held out."""
    found = {}
    for path in sorted(data.glob("*.txt")):
        every = pieces(path, tokenizer)
        held_out = every[HELD_OUT // 2 :: HELD_OUT]
        rest = [piece for number, piece in enumerate(every) if number % HELD_OUT != HELD_OUT // 2]
        found[path.stem] = rest[:: max(1, sum(map(len, rest)) // OF_DOMAIN)], held_out
    if not found:
        raise SystemExit(f"There are no .txt files in {data}.")
    return found


def calibration_text(domains: list[list[str]], seed: int) -> str:
    """Short texts of all domains, in any order."""
    drawn = random.Random(seed)
    chosen = [x for rows in domains for x in drawn.sample(rows, min(len(rows), CALIBRATION["pieces"]))]
    drawn.shuffle(chosen)
    return "\n\n".join(x[: CALIBRATION["characters"]] for x in chosen)


def windows(held_out: list[str], tokenizer: PreTrainedTokenizerBase, setting: Setting) -> torch.Tensor:
    """[N, length] token ids, one piece after another."""
    ids = [i for piece in held_out for i in [*tokenizer(piece).input_ids, tokenizer.eos_token_id]]
    rows = min(setting.held_out, len(ids) // setting.length)
    return torch.tensor(ids[: rows * setting.length]).view(rows, setting.length)


@torch.no_grad()
def losses(folder: Path, held_out: dict[str, torch.Tensor], device: str) -> dict[str, float]:
    """Of each domain, and their mean."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    found = {}
    for name, ids_NT in held_out.items():
        ids_NT = ids_NT.to(device)
        logits_NTV = model(ids_NT, use_cache=False).logits[:, :-1]
        found[name] = torch.nn.functional.cross_entropy(logits_NTV.mT, ids_NT[:, 1:]).item()
    del model
    free()
    return found | {"mean": sum(found.values()) / len(found)}


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trained(recipe: str, model: Path, output: Path, setting: Setting, **further) -> Path:
    """The model that the recipe of that name makes."""
    shutil.rmtree(output, ignore_errors=True)
    of_all = {"max_length": setting.length, "save_strategy": "no", "logging_steps": 10}
    of_all |= {"per_device_train_batch_size": setting.rows, "activation_checkpointing": False}
    train(f"{setting.recipes}/{recipe}", str(model), output_dir=str(output), **of_all | further)
    free()
    return output


def mixture(args: argparse.Namespace, setting: Setting, seed: int) -> Path:
    """The dense model with experts that have come to differ."""
    start, output = args.work / f"upcycled-{seed}", args.work / f"parent-{seed}"
    shutil.rmtree(start, ignore_errors=True)
    how = {"experts": EXPERTS, "top_k": TOP_K, "strategy": args.strategy, "seed": seed}
    upcycle(args.model, start, **how, verify=False, progress=False)
    batch = setting.rows * setting.length
    how = {"train_tokens": args.steps * batch, "batch_tokens": batch, "ema_decay": None}
    if args.balance is not None:
        how["router_aux_loss_coef"] = args.balance
    trained("continue", start, output, setting, train_data=str(args.work / "train.jsonl"), seed=seed, **how)
    shutil.rmtree(start)
    return output


class Begun(NamedTuple):
    """A seed whose mixture is trained and being pruned. pruned: name -> the folder of a pruned model, and the report
    that it will have. seconds: of each part."""

    seed: int
    parent: Path
    pruned: dict[str, tuple[Path, Future]]
    seconds: dict[str, float]


def timed(seconds: dict[str, float], part: str, function: Callable, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    seconds[part] = round(seconds.get(part, 0.0) + time.perf_counter() - start, 1)
    return result


def begin(
    args: argparse.Namespace, setting: Setting, seed: int, domains: list[list[str]], pool: ProcessPoolExecutor
) -> Begun:
    seconds: dict[str, float] = {}
    parent = timed(seconds, "training", mixture, args, setting, seed)
    calibration = args.work / f"calibration-{seed}.txt"
    calibration.write_text(calibration_text(domains, seed))
    pruned = {}
    for name, how in PRUNED.items():
        folder = args.work / f"{name.replace(' ', '_')}-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        given = {"experts": KEPT, "calibration": str(calibration), "calibration_tokens": SEEN, "seed": seed}
        report = pool.submit(prune, str(parent), str(folder), **given, **how, verify=False, progress=False)
        pruned[name] = folder, report
    return Begun(seed, parent, pruned, seconds)


def finish(args: argparse.Namespace, setting: Setting, begun: Begun, held_out: dict, device: str) -> dict:
    """The losses of a seed's models, which are then removed."""
    seed, parent, pruned, seconds = begun
    found, kept = {PARENT: timed(seconds, "losses", losses, parent, held_out, device)}, {}
    for name, (folder, report) in pruned.items():
        kept[name] = timed(seconds, "waiting for what is pruned", report.result)["kept"]
        found[name] = timed(seconds, "losses", losses, folder, held_out, device)
    distilled = timed(seconds, "distillation", distil, args, setting, seed, parent, pruned["reap"][0])
    found[DISTILLED] = timed(seconds, "losses", losses, distilled, held_out, device)
    for folder in (parent, distilled, *(folder for folder, _ in pruned.values())):
        shutil.rmtree(folder)
    return {"seed": seed, "losses": found, "kept": kept, "seconds": seconds}


def experiment(args: argparse.Namespace, setting: Setting, device: str) -> None:
    versions = installed()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    domains = domains_of(args.data, tokenizer)
    held_out = {name: windows(rows, tokenizer, setting) for name, (_, rows) in domains.items()}
    for name, ids_NT in held_out.items():
        if not len(ids_NT):
            raise SystemExit(f"{name}.txt is too short: held out of it is less than a row of {setting.length} tokens.")
    report = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "versions": versions,
        "model": args.model.name,
        "setting": setting._asdict()
        | {"strategy": args.strategy, "steps": args.steps, "distil_steps": args.distil_steps, "seen": SEEN}
        | ({} if args.balance is None else {"balance": args.balance}),
        "domains": list(domains),
        "held_out_tokens": sum(x.numel() for x in held_out.values()),
        "runs": [],
    }
    report["runs"] = runs_of(args.out, report)
    done = [run["seed"] for run in report["runs"]]
    args.work.mkdir(parents=True, exist_ok=True)
    train_rows = [rows for rows, _ in domains.values()]
    write_rows(args.work / "train.jsonl", [piece for rows in train_rows for piece in rows])
    workers = len(PRUNED)
    threads = max(1, (os.cpu_count() or 1) // workers)
    # The CPU prunes one mixture while the next one is trained.
    with ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        before = None
        for seed in [*(seed for seed in range(args.seeds) if seed not in done), None]:
            begun = None if seed is None else begin(args, setting, seed, train_rows, pool)
            if before is not None:
                report["runs"].append(finish(args, setting, before, held_out, device))
                report["runs"].sort(key=lambda run: run["seed"])
                write(args.out, report)
            before = begun
    print(table(report))


def installed() -> dict[str, str]:
    try:
        return {name: version(name) for name in PACKAGES}
    except PackageNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed: pip install 'hf_moe[train,merge]'") from error


def runs_of(out: Path, report: dict) -> list[dict]:
    """The seeds that are in a file of such a report; of another one nothing is lost, but SystemExit raised."""
    if not out.exists():
        return []
    there = json.loads(out.read_text())
    for name in report.keys() - {"runs"}:
        if there.get(name) != report[name]:
            raise SystemExit(f"{out} has {name} {there.get(name)}, now it is {report[name]}: name another --out.")
    return there["runs"]


def write(out: Path, report: dict) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    for path, text in ((out, json.dumps(report, indent=1) + "\n"), (out.with_suffix(".md"), table(report))):
        with written_aside(path) as aside:
            aside.write_text(text)
    run = report["runs"][-1]
    means = {name: round(x["mean"], 4) for name, x in run["losses"].items()}
    print(json.dumps({"seeds": len(report["runs"]), "of the last": means}), file=sys.stderr, flush=True)


def distil(args: argparse.Namespace, setting: Setting, seed: int, parent: Path, pruned: Path) -> Path:
    of_teacher = {"teacher_model_name_or_path": str(parent), "trainable": "moe_only", "temperature": 1.0}
    how_long = {"max_steps": args.distil_steps, "gradient_accumulation_steps": 1, "learning_rate": RATE}
    rows = {"train_data": str(args.work / "train.jsonl"), "assistant_only_loss": False, "seed": seed}
    rows["per_device_train_batch_size"] = setting.rows // 2  # the logits of two models are in memory, in float32
    return trained("distil", pruned, args.work / f"distilled-{seed}", setting, **of_teacher, **how_long, **rows)


def table(report: dict) -> str:
    runs, setting = report["runs"], report["setting"]
    names, domains = list(runs[0]["losses"]), [x for x in runs[0]["losses"][PARENT] if x != "mean"]

    def mean(name: str, domain: str) -> float:
        return sum(run["losses"][name][domain] for run in runs) / len(runs)

    seeds = " | ".join(f"seed {run['seed']}" for run in runs)
    lines = [
        f"# {KEPT} of {EXPERTS} experts",
        "",
        f"{report['model']}, upcycled to {EXPERTS} experts ({setting['strategy']}), {TOP_K} a token, and trained for "
        f"{setting['steps']} steps of {setting['rows'] * setting['length']:,} tokens on {len(domains)} domains"
        f"{f', with a balance loss times {balance}' if (balance := setting.get('balance')) is not None else ''}; "
        f"distilled for {setting['distil_steps']} steps of half as many. Held-out loss, nats a token, mean over "
        "domains; each seed has a mixture of its own.",
        "",
        f"| | {seeds} | mean | above {PARENT} |",
        f"|---|{'--:|' * (len(runs) + 2)}",
    ]
    for name in names:
        each = " | ".join(f"{run['losses'][name]['mean']:.4f}" for run in runs)
        lines.append(
            f"| {name} | {each} | {mean(name, 'mean'):.4f} | {mean(name, 'mean') - mean(PARENT, 'mean'):+.4f} |"
        )
    lines.append("")
    for other in ("frequency", "random"):
        fewer = sum(run["losses"]["reap"]["mean"] < run["losses"][other]["mean"] for run in runs)
        lines.append(f"By reap less is lost than by {other} in {fewer} of {len(runs)} seeds.  ")
    lines += ["", "By domain, mean over seeds:", "", f"| | {' | '.join(names)} |", f"|---|{'--:|' * len(names)}"]
    lines += [f"| {domain} | " + " | ".join(f"{mean(x, domain):.3f}" for x in names) + " |" for domain in domains]
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    took = ", ".join(f"{name} {sum(run['seconds'][name] for run in runs):.0f} s" for name in runs[0]["seconds"])
    return "\n".join([*lines, "", f"{report['device']}; {versions}; {took}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the dense model")
    parser.add_argument("--data", type=Path, required=True, help="folder of .txt files, one a domain")
    parser.add_argument("--work", type=Path, required=True, help="folder for the models of all seeds")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--strategy", choices=("copy", "drop"), default="copy", help="of the upcycling")
    parser.add_argument("--balance", type=float, help="what its loss counts; the recipe's by default")
    parser.add_argument("--steps", type=int, default=120, help="of each mixture's training")
    parser.add_argument("--distil-steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    experiment(args, SETTINGS[device], device)


if __name__ == "__main__":
    main()
