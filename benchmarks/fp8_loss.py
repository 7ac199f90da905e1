"""What training in FP8 costs in loss: held-out loss beside bf16's, seed by seed, and both curves.

    python benchmarks/fp8_loss.py --data debian.jsonl.xz --work DIR --out benchmarks/results/fp8_loss.json

A mixture of six layers of 512 dimensions, 16 experts of 256, four a token, learns a text (rows with a column `text`,
shuffled, the last of them held out) from random weights by `olmoe-1b-7b/pretrain`, 2,000 steps of 16,384 tokens at
3e-3. Both precisions of a seed have the same first weights and rows in the same order. DeepSeek-V3 says that FP8 is
within 0.25% (https://arxiv.org/abs/2412.19437, 3.3). Runs share the card; each is written as it ends, and the same
command makes those that are missing. A picture comes to stand beside the .json.
"""

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path

import torch
import transformers
from hf_moe.experiments.runner import write
from hf_moe.experiments.text import LEARNT_FROM, demo_tokenizer, learnt, up_to

from hf_moe import HfMoeConfig, train
from hf_moe.texts import texts
from hf_moe.version import __version__

PRECISIONS = ("bf16", "fp8")
VOCABULARY, HELD_OUT = 4096, 400  # tokens, documents
SIZES = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 512,
}
ROWS, LENGTH = 32, 512


def prepare(args: argparse.Namespace) -> None:
    """The text in two files, and a folder with a configuration and a vocabulary learnt from it."""
    documents = iter(texts(args.data, demo_tokenizer()))
    first = list(up_to(documents, LEARNT_FROM))
    every = list(chain(first, documents))
    for name, part in (("train", every[:-HELD_OUT]), ("held_out", every[-HELD_OUT:])):
        with open(args.work / f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in part)
    tokenizer = learnt(first, VOCABULARY)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    HfMoeConfig(vocab_size=len(tokenizer), **SIZES, **ids).save_pretrained(args.work / "model")
    tokenizer.save_pretrained(args.work / "model")


def curve(work: Path, precision: str, seed: int, steps: int) -> list[list[float]]:
    """[step, held-out loss] of a run."""
    batch = ROWS * LENGTH
    on_cpu = {} if torch.cuda.is_available() else {"use_cpu": True, "bf16": False}
    trained = train(
        "olmoe-1b-7b/pretrain",
        work / "model",
        train_data=str(work / "train.jsonl"),
        eval_data=str(work / "held_out.jsonl"),
        output_dir=str(work / f"{precision}-{seed}"),
        train_tokens=steps * batch,
        batch_tokens=batch,
        max_length=LENGTH,
        per_device_train_batch_size=ROWS,
        per_device_eval_batch_size=ROWS,
        learning_rate=3e-3,
        warmup_steps=0.1,
        activation_checkpointing=False,
        eval_strategy="steps",
        eval_steps=max(1, steps // 20),
        save_strategy="no",
        fp8=precision == "fp8",
        seed=seed,
        **on_cpu,
    )
    return [[x["step"], x["eval_loss"]] for x in trained.trainer.state.log_history if "eval_loss" in x]


def summed_up(runs: dict[str, list[list[float]]], seeds: int) -> dict:
    """The mean of the last losses of each precision, and how far FP8 is above bf16, seed by seed, in percent."""
    last = {name: points[-1][1] for name, points in runs.items()}
    means = {x: statistics.mean(last[f"{x}-{seed}"] for seed in range(seeds)) for x in PRECISIONS}
    above = [100 * (last[f"fp8-{seed}"] / last[f"bf16-{seed}"] - 1) for seed in range(seeds)]
    return {
        "held_out_loss": {name: round(x, 5) for name, x in means.items()},
        "percent_above_bf16": [round(x, 3) for x in above],
        "percent_of_means": round(100 * (means["fp8"] / means["bf16"] - 1), 3),
    }


def picture(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for color, precision in zip(("#000000", "#D55E00"), PRECISIONS, strict=True):
        for name, points in report["runs"].items():
            if name.startswith(precision):
                label = precision if name.endswith("-0") else None
                axes.plot(*zip(*points, strict=True), color=color, linewidth=1, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss, nats a token")
    axes.set_title(f"{report['device']}, {report['seeds']} seeds", fontsize=10)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a text, or rows with a column `text`")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    said = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": {x.__name__: x.__version__ for x in (torch, transformers)} | {"hf_moe": __version__},
        "data": Path(args.data).name,
        "model": SIZES,
        "steps": args.steps,
        "seeds": args.seeds,
    }
    report = said | {"runs": {}}
    if args.out.is_file():
        before = json.loads(args.out.read_text(encoding="utf-8"))
        if {name: before.get(name) for name in said} != said:
            raise SystemExit(f"{args.out} is of other runs, or another card or release: name another --out.")
        report["runs"] = before["runs"]
    args.work.mkdir(parents=True, exist_ok=True)
    prepare(args)
    wanted = [(x, seed) for seed, x in product(range(args.seeds), PRECISIONS) if f"{x}-{seed}" not in report["runs"]]
    # A forked process could not use the GPU.
    with ProcessPoolExecutor(max(1, len(wanted)), get_context("spawn")) as pool:
        waiting = {pool.submit(curve, args.work, *one, args.steps): "{}-{}".format(*one) for one in wanted}
        for ended in as_completed(waiting):
            report["runs"][waiting[ended]] = ended.result()
            write(args.out, report)
    report |= summed_up(report["runs"], args.seeds)
    write(args.out, report)
    picture(report, args.out.with_suffix(".png"))
    print(json.dumps({name: report[name] for name in ("held_out_loss", "percent_above_bf16", "percent_of_means")}))


if __name__ == "__main__":
    main()
