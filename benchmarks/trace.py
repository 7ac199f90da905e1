"""What `hf-moe trace` costs beside the plain forward of the same text: time, and memory at growing lengths.

    python benchmarks/trace.py MODEL --data text.txt --tokens 4000 16000 --out table.md

Every measurement is a process of its own, so that peak memory is its own, too. `plain` runs the batches of `trace`
through the model and keeps nothing; `count` adds the counting alone, which grows with the text; `trace` is all that
the command does after loading, with its default options: reading, counting, comparing experts, leaving them out,
writing. CPU seconds count all cores, and matter where others use the machine.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from hf_moe.loading import load
from hf_moe.telemetry import trace
from hf_moe.telemetry.tracing import BATCH_TOKENS, WINDOW, Domain, Run
from hf_moe.version import __version__

KINDS = ("plain", "count", "trace")


@torch.inference_mode()
def plain(model, tokenizer, data: str, tokens: int) -> None:
    for batch in Domain("text", data, tokenizer, WINDOW, tokens).batches(BATCH_TOKENS):
        model(input_ids=batch.ids.to(model.device), attention_mask=batch.mask.to(model.device), use_cache=False)


def measure(kind: str, name: str, data: str, tokens: int) -> dict:
    model, tokenizer = load(name)
    plain(model, tokenizer, data, 2 * WINDOW)  # the first forward loads kernels
    forget_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    parts = {}
    if kind == "plain":
        plain(model, tokenizer, data, tokens)
    elif kind == "count":
        run = Run(model, tokenizer, name, {"text": data}, tokens, progress=False)
        run.count_tokens()
        run.count_routing()
    else:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out"
            parts = trace(model, data, out, tokenizer=tokenizer, max_tokens=tokens, progress=False)["seconds"]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"wall": wall, "cpu": cpu, "peak": peak(), "parts": parts}


def forget_peak() -> None:
    """Let Linux count the most memory from here on: loading takes more than running."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """The most memory that this process has had since then, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a mixture of experts: a folder or a Hub id")
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4000, 16000])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind is not None:
        print(json.dumps(measure(args.kind, args.model, args.data, args.tokens[0])))
        return

    lines = [
        f"# What trace costs: {Path(args.model).name}",
        "",
        f"hf_moe {__version__}, torch {torch.__version__}, Transformers {transformers.__version__}, "
        f"{'CUDA' if torch.cuda.is_available() else platform.machine() + ' CPU'}, {torch.get_num_threads()} threads; "
        f"the first tokens of {Path(args.data).name}, {WINDOW} read together.",
        "",
        "| tokens | plain, CPU s | count, CPU s | ratio | trace, CPU s | ratio | plain, s | trace, s "
        "| plain, MB | trace, MB |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for tokens in args.tokens:
        found = {}
        for kind in KINDS:
            words = [args.model, "--data", args.data, "--tokens", str(tokens), "--kind", kind]
            done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, check=True)
            found[kind] = json.loads(done.stdout.splitlines()[-1])
            print(kind, tokens, found[kind], file=sys.stderr, flush=True)
        cpu = {kind: found[kind]["cpu"] for kind in KINDS}
        cells = [f"{tokens:,}", f"{cpu['plain']:.1f}"]
        cells += [x for kind in KINDS[1:] for x in (f"{cpu[kind]:.1f}", f"{cpu[kind] / cpu['plain']:.2f}")]
        cells += [f"{found[kind]['wall']:.0f}" for kind in ("plain", "trace")]
        cells += [f"{found[kind]['peak']:,.0f}" for kind in ("plain", "trace")]
        lines.append("| " + " | ".join(cells) + " |")
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
