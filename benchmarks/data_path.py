"""A million conversations from their file to packed rows: rate and memory, first and from the cache.

    python benchmarks/data_path.py [--rows 1000000] [--tokenizer DIR] [--template NAME] [--out FILE.md]

The rows recombine sentences of `--text`, a file of conversations. Each stage is what `hf-moe train` calls: read and
check the file, render the chat template, tokenise, mark the assistant's words, cache, drop what cannot train, pack. It
runs in a process of its own, tied to two cores; memory is that process's and its children's, ten times a second.

In a control group whose memory is limited (`systemd-run --scope -p MemoryMax=2G python ...`), the page cache of files
counts, too, and the report names the limit.
"""

import argparse
import json
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import psutil

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PROCESSES = 2


def generate(path: Path, count: int, text: Path) -> None:
    """Conversations of one question (1 or 2 sentences) and one answer (2 to 5), new for every row."""
    with text.open(encoding="utf-8") as file:
        rows = [json.loads(line)["messages"] for line in file]
    pools = {"user": [], "assistant": []}
    for message in (message for row in rows for message in row if message["role"] in pools):
        pools[message["role"]] += [part for part in re.split(r"(?<=[.?!])\s+", message["content"]) if len(part) < 200]
    chance = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            row = [
                {"role": role, "content": " ".join(chance.choices(pools[role], k=chance.randint(low, high)))}
                for role, low, high in (("user", 1, 2), ("assistant", 2, 5))
            ]
            file.write(json.dumps({"messages": row}, ensure_ascii=False) + "\n")


class Memory(threading.Thread):
    """Peaks, in kB, of the memory of this process and its children together, as Linux counts it: pages that several
    share count once. `own` is what they allocated; `all` adds the pages of mapped files, which the kernel may drop.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self.own = self.all = 0

    def run(self):
        this = psutil.Process()
        while True:
            sizes = [self.read(process.pid) for process in [this, *this.children(recursive=True)]]
            self.own, self.all = (
                max(old, sum(new)) for old, new in zip((self.own, self.all), zip(*sizes, strict=True), strict=True)
            )
            time.sleep(0.1)

    @staticmethod
    def read(pid: int) -> tuple[int, int]:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:  # it has ended
            return 0, 0
        found = {name: int(size) for name, size in re.findall(r"^(Pss|Pss_Anon):\s+(\d+) kB", text, re.MULTILINE)}
        return found.get("Pss_Anon", 0), found.get("Pss", 0)


def measure(path: Path, tokenizer_path: str, template: str, cache: Path, max_length: int) -> dict:
    """Seconds of wall clock and of CPU of each stage, peaks of memory, and what came out."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import datasets
    import pyarrow.compute as pc
    from hf_moe.training.data.chat_templates import shipped_templates
    from hf_moe.training.data.packing import pack
    from hf_moe.training.data.rows import load_rows
    from hf_moe.training.data.token_cache import tokenised
    from hf_moe.training.trainers.sft_trainer import MoeSFTConfig
    from transformers import AutoTokenizer

    datasets.config.HF_DATASETS_CACHE = cache
    datasets.disable_progress_bars()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:PROCESSES])
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    tokenizer.chat_template = Path(shipped_templates()[template]).read_text(encoding="utf-8")
    args = MoeSFTConfig(
        output_dir=str(cache / "unused"),
        use_cpu=True,
        bf16=False,
        max_length=max_length,
        packing=True,
        assistant_only_loss=True,
        dataset_num_proc=PROCESSES,
    )
    memory = Memory()
    memory.start()
    stages = {}

    def stage(name, run):
        wall, cpu = time.perf_counter(), sum(os.times()[:4])
        result = run()
        stages[name] = {"wall_s": time.perf_counter() - wall, "cpu_s": sum(os.times()[:4]) - cpu}
        return result

    rows = stage("read and check", lambda: load_rows([str(path)], split="train"))
    tokens = stage("render, tokenise, mark, cache", lambda: tokenised(rows, "rows", tokenizer, args))
    packed = stage("pack", lambda: pack(tokens, max_length, PROCESSES))
    lengths = packed.data.column("seq_lengths").combine_chunks().flatten()
    filled = pc.sum(lengths).as_py()
    some = range(0, len(packed), max(1, len(packed) // 500))
    stage("read 500 packs in any order", lambda: [packed[place] for place in some])
    return {
        "rows": len(lengths),
        "tokens": filled,
        "packs": len(packed),
        "full": filled / (len(packed) * max_length),
        "stages": stages,
        "own_gb": memory.own * 1024 / 1e9,
        "all_gb": memory.all * 1024 / 1e9,
    }


def report(results: dict[str, dict], arguments: argparse.Namespace, size: int) -> str:
    first = results["first"]
    lines = [
        "# The data path of large_sft",
        "",
        f"`python benchmarks/data_path.py --rows {arguments.rows}`: {first['rows']:,} conversations of "
        f"{first['tokens'] / first['rows']:.0f} tokens on average ({size / 1e6:,.0f} MB of JSON lines), the tokenizer "
        f"of {arguments.name}, template `{arguments.template}`, packs of {arguments.max_length} tokens, "
        f"{PROCESSES} processes on {PROCESSES} cores.",
        "",
        "| stage | first, s | first, CPU s | from the cache, s | from the cache, CPU s |",
        "|---|---:|---:|---:|---:|",
    ]
    totals = {name: {"wall_s": 0.0, "cpu_s": 0.0} for name in results}
    for name in first["stages"]:
        cells = [results[run]["stages"][name][unit] for run in results for unit in ("wall_s", "cpu_s")]
        lines.append(f"| {name} | " + " | ".join(f"{cell:.1f}" for cell in cells) + " |")
    for run, total in totals.items():
        for unit in total:
            total[unit] = sum(stage[unit] for name, stage in results[run]["stages"].items() if "packs" not in name)
    lines.append("")
    for run, total in totals.items():
        rows = results[run]["rows"]
        lines += [
            f"- {run.capitalize()}: {rows / total['wall_s']:,.0f} examples a second by the clock, "
            f"{PROCESSES * rows / total['cpu_s']:,.0f} by the CPU time of {PROCESSES} cores "
            f"({results[run]['tokens'] / total['wall_s'] / 1e6:.2f} million tokens a second by the clock). Peak "
            f"memory {results[run]['own_gb']:.2f} GB, with the mapped cache files {results[run]['all_gb']:.2f} GB.",
        ]
    lines += [
        "- CPU time is what two cores to themselves would take; by the clock, whatever else runs on them counts, too. "
        "Mapped files are the cache on disk, whose pages the kernel drops when it needs them.",
        *memory_limit(),
        f"- {first['packs']:,} packs, {first['full']:.2%} full.",
        f"- {cpu_name()}; load {os.getloadavg()[0]:.1f} at the end, this run's own included.",
        f"- Python {platform.python_version()}, "
        + ", ".join(f"{name} {version(name)}" for name in ("datasets", "tokie", "transformers", "trl", "pyarrow"))
        + ".",
    ]
    return "\n".join(lines) + "\n"


def memory_limit() -> list[str]:
    """A line that says how much memory the control group of this process may take, where there is a limit."""
    root, lines = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
    for line in lines.read_text().splitlines() if lines.exists() else []:
        _, controllers, name = line.split(":", 2)
        for file in (root / f".{name}/memory.max", root / f"memory/.{name}/memory.limit_in_bytes"):
            belongs = "memory" in controllers.split(",") if "limit" in file.name else not controllers
            if belongs and file.exists() and (limit := file.read_text().strip()).isdigit() and int(limit) < 1 << 60:
                size = f"{int(limit) / 1e9:.2f} GB"
                return [
                    f"- All of it in a control group of at most {size}, which counts the page cache of files, too."
                ]
    return []


def cpu_name() -> str:
    found = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else 0
    )
    return f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--text", type=Path, default=SHARED / "sft" / "train.jsonl")
    parser.add_argument("--tokenizer", default=str(SHARED / "stories260K-hf"))
    parser.add_argument("--name", default="stories260K", help="what to call the tokenizer in the report")
    parser.add_argument("--template", default="plain")
    parser.add_argument("--max_length", type=int, default=4096)
    parser.add_argument("--out", type=Path, help="a Markdown file; default: standard output")
    parser.add_argument("--folder", type=Path, help="where the rows and the cache go; default: a temporary folder")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        path, cache = arguments.folder / "rows.jsonl", arguments.folder / "cache"
        print(json.dumps(measure(path, arguments.tokenizer, arguments.template, cache, arguments.max_length)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "rows.jsonl"
        generate(path, arguments.rows, arguments.text)
        again = [sys.executable, __file__, *sys.argv[1:], "--folder", folder, "--measure"]
        results = {}
        for run in ("first", "from the cache"):
            output = subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[run] = json.loads(output.splitlines()[-1])
        text = report(results, arguments, path.stat().st_size)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
