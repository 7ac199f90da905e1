"""How long a fresh process takes to its first token, by part, with nothing kept on disk and with all that can be.

    python benchmarks/first_token.py --out benchmarks/results/first_token.json

The shape of OLMoE-1B-7B in bfloat16 with random weights, saved; then two processes, one after the other, import, load
and write one greedy text. They share a folder for compiled kernels, empty at first. `first_token` is what `generate`
takes until a streamer has it: reading the prompt, with kernels that are compiled, or found in the folder and loaded.
`recording` comes behind it and before the second token. `later_first_token` is that of another prompt of the same
length in the same process: what is left is reading. Exits with 1 where the second start's takes more than two seconds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

STARTED = time.perf_counter()  # torch is there; the process before it is counted from outside
MOST = 2.0  # seconds to the first token of a second start


class Clock:
    """Seconds between marks, with the device's work in them."""

    def __init__(self):
        self.last, self.parts = STARTED, {}

    def mark(self, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.parts[name], self.last = now - self.last, now


def measure(folder: str, context: int, new: int) -> dict[str, float]:
    """The parts of one start, in this process."""
    clock = Clock()
    import transformers

    clock.mark("import_transformers")
    from hf_moe import HfMoeForCausalLM
    from hf_moe.model import decoding

    clock.mark("import_hf_moe")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = HfMoeForCausalLM.from_pretrained(folder, dtype="auto", device_map=device).eval()
    clock.mark("load")
    record = decoding.RecordedStep.record

    def recorded(step):
        clock.last = time.perf_counter()
        record(step)
        clock.mark("recording")

    decoding.RecordedStep.record = recorded

    class Heard(transformers.generation.streamers.BaseStreamer):
        def __init__(self, name: str):
            self.name, self.count = name, 0

        def put(self, value):
            if self.count == 1:  # behind the prompt
                clock.mark(self.name)
            self.count += 1

        def end(self):
            pass

    generator = torch.Generator().manual_seed(0)
    for name in ("first_token", "later_first_token"):
        ids = torch.randint(5, model.config.vocab_size, (1, context), generator=generator).to(device)
        clock.last = time.perf_counter()
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, streamer=Heard(name)
        )
    return {name: round(seconds, 3) for name, seconds in clock.parts.items()}


def start(folder: Path, kernels: Path, args: argparse.Namespace) -> dict[str, float]:
    """The parts of a start in a process of its own, and all of it."""
    words = [sys.executable, __file__, "--measure", str(folder)]
    words += ["--context", str(args.context), "--new", str(args.new)]
    begin = time.perf_counter()
    done = subprocess.run(
        words, env=os.environ | {"TRITON_CACHE_DIR": str(kernels)}, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1]) | {"process": round(time.perf_counter() - begin, 3)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--shape", default="olmoe-1b-7b", help="one of olmoe.py's")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--measure", metavar="FOLDER", help="be one of the processes, and print its parts")
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(args.measure, args.context, args.new)))
        return
    if args.out is None:
        parser.error("--out is missing.")
    import transformers
    from olmoe import build, hf_moe_model, shape

    from hf_moe.version import __version__

    device = "cuda" if torch.cuda.is_available() else "cpu"
    versions = {"hf_moe": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    report = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "versions": versions}
    report |= {"shape": args.shape, "context": args.context}
    with tempfile.TemporaryDirectory() as folder:
        model, kernels = Path(folder) / "model", Path(folder) / "kernels"
        build(hf_moe_model, shape(args.shape), device, torch.bfloat16).save_pretrained(model)
        if device == "cuda":
            torch.cuda.empty_cache()
        for name in ("first_start", "second_start"):
            report[name] = start(model, kernels, args)
            print(name, report[name], flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    sys.exit(1 if report["second_start"]["first_token"] > MOST else 0)


if __name__ == "__main__":
    main()
