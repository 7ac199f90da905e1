"""A dense model to 8 experts: hf_moe beside mergekit-moe and MixtureKit, and beside plain copies of the same bytes.

    python -m venv MERGEKIT && MERGEKIT/bin/pip install mergekit==0.1.5
    python -m venv MIXTUREKIT && MIXTUREKIT/bin/pip install MixtureKit==1.1.1
    python benchmarks/conversion.py WORK --mergekit MERGEKIT --mixturekit MIXTUREKIT \
        [--rounds 3] [--out benchmarks/results/conversion.md]

WORK: a folder on the disk to measure, with 30 GB free. The dense model is a random bfloat16 Llama of TinyLlama's
sizes.
Converters take turns, each in a process of its own; a round's output is removed before the next. Time counts until the
bytes are on the disk (`sync`), imports included. Memory is the largest sum of RssAnon over the process and its
children, looked at every 10 ms. hf_moe is the command `hf-moe upcycle --no-verify`, as neither the
peers nor a copy compare any logits. "cp -r" copies what it has just written; "copy from memory" writes as many bytes
with copy_file_range out of the 2.2 GB source, which the system holds in memory, so that nothing is read from the disk.
The same command with --dry-run says how long it takes to the first byte.

What a conversion computes is compared on a small Llama of the same kind with biases, in float32, after the tools' own
conversion of it: the largest difference between a logit of the result and of the dense model.
"""

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EXPERTS, TOP_K = 8, 2
LARGE = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,  # outputs far from uniform, so that a wrong one shows
}
VOCAB_SIZE = 32000
CP, FROM_MEMORY, DRY = "cp -r", "copy from memory", "hf_moe --dry-run"  # beside the converters

# Run by the converter's own Python.
MIXTUREKIT = """
import sys
import torch
from MixtureKit import build_moe
experts = [dict(expert_name=f"expert_{{i}}", model_id=sys.argv[1]) for i in range({experts})]
build_moe(dict(moe_method="traditional", model_type="upcycled", num_experts_per_tok={top_k}, experts=experts,
    router_layers=["mlp"], router_layers_index=[]), torch.{dtype}, output_dir=sys.argv[2])
"""
MERGEKIT_CONFIG = """\
base_model: {source}
gate_mode: random
dtype: {dtype}
experts_per_token: {top_k}
experts:
"""
COPY = """
import os, sys
source, left = open(sys.argv[1] + "/model.safetensors", "rb"), int(sys.argv[3])
os.makedirs(sys.argv[2])
size = os.fstat(source.fileno()).st_size
with open(sys.argv[2] + "/copy", "wb") as target:
    while left:
        offset = 0
        while left and offset < size:
            done = os.copy_file_range(source.fileno(), target.fileno(), min(left, size - offset, 1 << 26), offset)
            offset, left = offset + done, left - done
"""
# Loads with the converter's own Transformers; prints the largest difference to the dense model's logits.
COMPARE = """
import sys, torch
from transformers import AutoModelForCausalLM
try:
    import hf_moe
except ImportError:
    pass
ids = torch.arange(0, 20000, 331)[None]
logits = []
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    with torch.no_grad():
        logits.append(model(ids).logits)
print((logits[0] - logits[1]).abs().max().item())
"""


def make_dense(folder: Path, dtype: torch.dtype, **fields) -> None:
    """A random Llama with a tokenizer, which mergekit insists on."""
    if folder.exists():
        return
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB_SIZE, **fields)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(dtype).to_empty(device="cpu")
    model.init_weights()
    model.save_pretrained(folder, max_shard_size="100GB")
    vocabulary = {f"w{index}": index for index in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)


def anonymous(pid: int) -> int:
    """RssAnon of a process and its children, bytes."""
    total = 0
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        total = int(status.split("RssAnon:")[1].split()[0]) * 1024
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += sum(anonymous(int(child)) for child in (task / "children").read_text().split())
    except (FileNotFoundError, ProcessLookupError, IndexError):
        pass  # it has just ended
    return total


def measured(command: list[str], output: Path) -> dict:
    """Run a converter. Its time until the disk has everything, its CPU time, peak memory and the bytes it wrote."""
    os.sync()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        while process.poll() is None:
            peak = max(peak, anonymous(process.pid))
            time.sleep(0.01)
        os.sync()
        seconds = time.perf_counter() - start
        if process.returncode:
            log.seek(0)
            return {"error": log.read().strip().splitlines()[-1]}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "seconds": seconds,
        "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "peak": peak,
        "bytes": sum(path.stat().st_size for path in output.rglob("*") if path.is_file()),
    }


def commands(args: argparse.Namespace, source: Path, output: Path, dtype: str) -> dict[str, list[str]]:
    sizes = {"experts": EXPERTS, "top_k": TOP_K, "dtype": dtype}
    ours = [str(Path(sys.executable).with_name("hf-moe")), "upcycle", str(source), str(output), "--no-verify"]
    ours += ["--experts", str(EXPERTS), "--top-k", str(TOP_K)]
    said = {"hf_moe": ours, "hf_moe --graft": [*ours, "--graft"]}
    if args.mergekit:
        config = args.work / f"mergekit-{dtype}.yaml"
        expert = f"  - source_model: {source}\n    positive_prompts: [w1]\n"
        config.write_text(MERGEKIT_CONFIG.format(source=source, **sizes) + expert * EXPERTS)
        said["mergekit-moe"] = [str(args.mergekit / "bin" / "mergekit-moe"), str(config), str(output)]
    if args.mixturekit:
        python = str(args.mixturekit / "bin" / "python")
        said["MixtureKit"] = [python, "-c", MIXTUREKIT.format(**sizes), str(source), str(output)]
    return said


def largest_difference(command: list[str], python: str, dense: Path, output: Path) -> str:
    """Of the logits, after converting the small model; or what went wrong."""
    shutil.rmtree(output, ignore_errors=True)
    for step in (command, [python, "-c", COMPARE, str(dense), str(output)]):
        run = subprocess.run(step, capture_output=True, text=True)
        if run.returncode:
            return "fails: " + (run.stderr.strip() or "?").splitlines()[-1][:160]
    return f"{float(run.stdout.split()[-1]):.1e}"


def version(python: str, package: str) -> str:
    program = f"import importlib.metadata as m; print(m.version('{package}'))"
    return subprocess.run([python, "-c", program], capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--mergekit", type=Path)
    parser.add_argument("--mixturekit", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.work = args.work.resolve()
    large, output = args.work / "dense", args.work / "converted"
    make_dense(large, torch.bfloat16, **LARGE)
    kinds = {"plain": args.work / "small", "with biases": args.work / "small-biases"}
    make_dense(kinds["plain"], torch.float32, **SMALL)
    make_dense(kinds["with biases"], torch.float32, **SMALL, attention_bias=True, mlp_bias=True)
    randomise_biases(kinds["with biases"])
    pythons = dict.fromkeys(("hf_moe", "hf_moe --graft"), sys.executable)
    pythons |= {"mergekit-moe": f"{args.mergekit}/bin/python", "MixtureKit": f"{args.mixturekit}/bin/python"}

    shutil.rmtree(output, ignore_errors=True)  # of a run that was stopped
    results: dict[str, list[dict]] = {}
    loads = []
    copied = args.work / "copied"

    def measure(name: str, command: list[str], written: Path) -> dict:
        results.setdefault(name, []).append(measured(command, written))
        print(len(loads), name, results[name][-1], flush=True)
        return results[name][-1]

    for _ in range(args.rounds):
        (ours, command), *peers = commands(args, large, output, "bfloat16").items()
        measure(DRY, [*command, "--dry-run"], copied)
        count = measure(ours, command, output)["bytes"]
        measure(CP, ["cp", "-r", str(output), str(copied)], copied)
        shutil.rmtree(copied)
        shutil.rmtree(output)
        measure(FROM_MEMORY, [sys.executable, "-c", COPY, str(large), str(output), str(count)], output)
        shutil.rmtree(output)
        for name, command in peers:
            measure(name, command, output)
            shutil.rmtree(output, ignore_errors=True)
        loads.append(os.getloadavg()[0])

    differences: dict[str, dict[str, str]] = {}
    for kind, dense in kinds.items():
        for name, command in commands(args, dense, output, "float32").items():
            differences.setdefault(name, {})[kind] = largest_difference(command, pythons[name], dense, output)
    shutil.rmtree(output, ignore_errors=True)
    print(json.dumps(differences, indent=1), flush=True)

    text = table(results, differences, pythons, loads, args)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


def randomise_biases(folder: Path) -> None:
    """Biases are zero in a new model; a converter that drops them should show."""
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder)


def table(results: dict, differences: dict, pythons: dict, loads: list[float], args: argparse.Namespace) -> str:
    packages = {"hf_moe": "hf_moe", "mergekit-moe": "mergekit", "MixtureKit": "MixtureKit"}
    seconds = {name: [run["seconds"] for run in runs if "seconds" in run] for name, runs in results.items()}
    copied, first = min(seconds[CP]), min(seconds[DRY])
    rows = []
    for name, runs in results.items():
        ended = [run for run in runs if "seconds" in run]
        differ = differences.get(name, {})
        if not ended:
            rows.append(f"| {name} | {runs[-1]['error'][:120]} | | | | | | | |")
            continue
        best, peak = min(seconds[name]), max(run["peak"] for run in ended)
        numbers = [f"{best:.1f}", f"{max(seconds[name]):.1f}", f"{best / copied:.2f}"]
        numbers += [f"{min(run['cpu'] for run in ended):.1f}", f"{peak / 1e9:.2f}", f"{ended[-1]['bytes'] / 1e9:.2f}"]
        rows.append("| " + " | ".join([name, *numbers, differ.get("plain", ""), differ.get("with biases", "")]) + " |")
    lines = [
        "# Upcycling a 1.1B Llama to 8 experts",
        "",
        f"A random bfloat16 Llama of TinyLlama's sizes (2.2 GB) to {EXPERTS} experts of which {TOP_K} work, by",
        "`python benchmarks/conversion.py`: " + f"the fastest of {args.rounds} rounds in which the tools take turns,",
        "and the slowest. Time includes imports and `sync`; memory is the peak of anonymous memory.",
        "",
        "| | s, fastest | slowest | / cp -r | CPU s | GB of memory | GB written | max \\|Δlogit\\| | with biases |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
        *rows,
        "",
        "- max |Δlogit|: a small Llama (4 layers, width 256, float32), converted and loaded by the tool's own "
        "Transformers, against the dense model; the last column with random biases in attention and MLP.",
        "- "
        + ", ".join(
            f"{name} {version(pythons[name], packages[name])} (Transformers "
            f"{version(pythons[name], 'transformers')}, torch {version(pythons[name], 'torch')})"
            for name in packages
            if name in results
        )
        + ".",
        f"- {os.cpu_count()} cores, {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GB of "
        f"memory, Python {platform.python_version()}; load averages after the rounds "
        + ", ".join(f"{load:.1f}" for load in loads)
        + ", this run's own included.",
        f"- hf_moe is the command `hf-moe upcycle --no-verify`. {CP} copies the files that it has just written; "
        f"{FROM_MEMORY} writes as many bytes from the source alone, which is in memory: beside that hf_moe takes "
        f"{min(seconds['hf_moe']) / min(seconds[FROM_MEMORY]):.2f} times as long.",
        f"- Of hf_moe's time {first:.1f} s pass before the first byte is written, nearly all in importing torch and "
        f"Transformers. Without them: {(min(seconds['hf_moe']) - first) / copied:.2f} of {CP}, "
        f"{(min(seconds['hf_moe']) - first) / min(seconds[FROM_MEMORY]):.2f} of {FROM_MEMORY}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
