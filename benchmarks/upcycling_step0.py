"""Where each upcycling strategy starts: logits and perplexity of the mixture beside the dense model's, untrained.

    python benchmarks/upcycling_step0.py DENSE --text held_out.txt --calibration other.txt --out table.md

converts DENSE (a folder, or a Hub id) with 8 experts by every strategy into a temporary folder and compares on the
first tokens of the text, in float32 on the CPU.
"""

import argparse
import platform
import tempfile
import time
from pathlib import Path

import torch
import transformers
from hf_moe.conversion import upcycle, verify

from hf_moe.version import __version__

TEXT = {"calibration": True}
# title -> arguments of upcycle; calibration is read where it is named
RUNS = {
    "copy": {"experts": 8, "top_k": 2},
    "granular, G = 4": {"experts": 8, "top_k": 2, "strategy": "granular", "granularity": 4},
    "shared, 1 added": {"experts": 8, "top_k": 2, "strategy": "shared"},
    "shared, 1 of 4 carved": {
        "experts": 8,
        "top_k": 2,
        "strategy": "shared",
        "granularity": 4,
        "carved": True,
        **TEXT,
    },
    "merge of 2 identical models": {"experts": 2, "top_k": 2, "strategy": "merge", "sources": 2},
    "noise, 0.01 std": {"experts": 8, "top_k": 2, "strategy": "noise", "noise_scale": 0.01},
    "noise, 0.05 std": {"experts": 8, "top_k": 2, "strategy": "noise"},
    "drop, r = 0.1": {"experts": 8, "top_k": 2, "strategy": "drop", "drop_ratio": 0.1},
    "drop, r = 0.5": {"experts": 8, "top_k": 2, "strategy": "drop"},
    "split, 8 of 8": {"experts": 8, "top_k": 8, "strategy": "split"},
    "split, 6 of 8, random": {"experts": 8, "top_k": 6, "strategy": "split"},
    "split, 6 of 8, clustered": {"experts": 8, "top_k": 6, "strategy": "split", **TEXT},
    "carve, 2 shared + 4 of 6": {"experts": 6, "top_k": 4, "strategy": "carve", "shared": 2, **TEXT},
    "carve, 2 shared + 2 of 6": {"experts": 6, "top_k": 2, "strategy": "carve", "shared": 2, **TEXT},
}


def measure(dense: str, arguments: dict, text: Path, calibration: Path, tokens: int) -> dict:
    arguments = dict(arguments)
    if arguments.pop("calibration", False):
        arguments["calibration"] = calibration
    sources = [dense] * arguments.pop("sources", 1)
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        report = upcycle(sources, Path(folder) / "moe", verify=False, progress=False, **arguments)
        seconds = time.perf_counter() - begin
        return report | {"seconds": seconds} | verify(dense, Path(folder) / "moe", data=text, max_tokens=tokens)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()

    name = Path(args.dense).name
    lines = [
        f"# Where upcycling starts: {name}",
        "",
        f"Untrained. Logits in float32 on the first {args.tokens} tokens of {args.text.name}, 256 at a time;",
        f"calibration on the first 4096 tokens of {args.calibration.name}; every layer is sparse. `equal` is what the",
        "strategy claims.",
        "",
        "| strategy | equal | parameters, M | active, M | max abs diff | KL, nats | top 1 agrees | perplexity | s |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for title, arguments in RUNS.items():
        found = measure(args.dense, arguments, args.text, args.calibration, args.tokens)
        equal = "yes" if found["equal_at_step_0"] else "no"
        lines.append(
            f"| {title} | {equal} | {found['total_params'] / 1e6:.0f} | {found['active_params'] / 1e6:.0f} "
            f"| {found['max_abs_diff']:.2g} | {found['kl']:.2g} | {found['top1_agreement']:.1%} "
            f"| {found['perplexity_b']:.4g} | {found['seconds']:.0f} |"
        )
        print(lines[-1], flush=True)
    lines += [
        "",
        f"- The dense model's perplexity is {found['perplexity_a']:.4g}.",
        "- In bfloat16 a factor that is no power of two rounds the weights: 3 with 1 of 4 carved, 6 of 8 split.",
        "- s: seconds of the conversion, without the comparison, on a machine that was not idle.",
        f"- Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"hf_moe {__version__}.",
    ]
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
