"""Half an hour of generate() as many people would call it: flat memory, and greedy texts as without recordings.

    python benchmarks/mixed_load_gpu.py --minutes 30 --out benchmarks/results/mixed_load.json

The shape of OLMoE-1B-7B with random weights and a module for multi-token prediction. Each request has 1 to 16 rows,
prompts of 1 to 2000 tokens of their own lengths, and 1 to 300 new tokens; it is greedy or sampled, plain, streamed,
cancelled on the way, drafted (`use_mtp`) or guided; without an adapter, with one (LoRA on attention and experts), or
with one that is switched off; and half of them know tokens that end a row. All that is drawn from the seed and the
request's number: `--only N` makes that one again.

Every greedy text is written again by `disable_compile=True` without drafts, and may differ from that only where two
tokens tie (greedy_texts.py; in float32 hardly anywhere). Memory is sampled between requests, when nothing is kept for
the next one, and all is given back that can be. Exits with 1 if a text differs elsewhere, a request fails, or memory
grows.
"""

import argparse
import gc
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import peft
import psutil
import torch
import transformers
from greedy_texts import BOUNDS, compared
from olmoe import SHAPES, build, hf_moe_model, shape
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from hf_moe.demo import DEMO_MODEL
from hf_moe.generation.guided import GuidedLogitsProcessor
from hf_moe.model.decoding import forget
from hf_moe.version import __version__

MOST = {"olmoe-1b-7b": (16, 2000, 300), "tiny": (3, 30, 20)}  # rows, tokens of a prompt, new tokens
MODES = ("plain", "streamed", "cancelled", "drafted", "guided")
ADAPTERS = ("none", "none", "on", "off")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
FAILURES = 20  # after so many there is nothing more to learn
GROWTH = 0.01  # of what a model and its largest request take: more is not flat


def draw(seed: int, number: int, most: tuple[int, int, int], vocabulary: int) -> dict:
    """A request: what it asks for, and the seed of its prompts."""
    rng = random.Random(f"{seed} {number}")
    rows, length, new = (rng.randint(1, x) for x in most)
    request = {"number": number, "mode": rng.choice(MODES), "adapter": rng.choice(ADAPTERS), "new": new}
    request |= {"lengths": [rng.randint(1, length) for _ in range(rows)], "sampled": rng.random() < 0.3}
    ends = rng.sample(range(5, vocabulary), vocabulary // 100) if rng.random() < 0.5 else None
    return request | {"ends": ends, "stop": rng.randint(1, new), "seed": rng.getrandbits(32)}


def said(request: dict) -> str:
    """A request in a line."""
    kind = f"{request['mode']}, {'sampled' if request['sampled'] else 'greedy'}, adapter {request['adapter']}"
    sizes = f"{len(request['lengths'])} x {max(request['lengths'])} + {request['new']}"
    return f"request {request['number']} ({kind}, {sizes}{', ends' if request['ends'] else ''})"


class Cancelled(StoppingCriteria):
    """Somebody who has read enough."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length, device=input_ids.device)


class Heard(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens.append(value.view(-1, 1) if value.dim() == 1 else value)

    def end(self):
        self.tokens = torch.cat(self.tokens, dim=1)


def prompts(request: dict, vocabulary: int, device: torch.device) -> dict[str, torch.Tensor]:
    """ids and mask [B, P], padded on the left."""
    generator, longest = torch.Generator().manual_seed(request["seed"]), max(request["lengths"])
    ids = torch.randint(5, vocabulary, (len(request["lengths"]), longest), generator=generator)
    mask = torch.arange(longest) >= longest - torch.tensor(request["lengths"]).unsqueeze(1)
    ids = ids.masked_fill(~mask, 1)
    return {"input_ids": ids.to(device), "attention_mask": mask.long().to(device)}


def asked(request: dict, longest: int, tokenizer) -> dict:
    """The arguments of generate; processors and criteria that serve one call."""
    settings = {"max_new_tokens": request["new"], "do_sample": request["sampled"], "pad_token_id": 1}
    settings["eos_token_id"] = request["ends"]
    if request["mode"] == "cancelled":
        settings["stopping_criteria"] = [Cancelled(longest + request["stop"])]
    if request["mode"] == "guided":
        settings["eos_token_id"] = tokenizer.eos_token_id
        settings["logits_processor"] = [GuidedLogitsProcessor(tokenizer, regex="([a-z]{1,9} ){1,60}")]
    return settings


@contextmanager
def adapted(model: PreTrainedModel, kind: str) -> Iterator[PreTrainedModel]:
    """The model, or with an adapter on or switched off, which is taken away afterwards."""
    if kind == "none":
        yield model
        return
    torch.manual_seed(0)  # the same adapter each time
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], target_parameters=["experts.down_proj"], init_lora_weights=False
    )
    wrapped = get_peft_model(model, config).eval()
    try:
        with wrapped.disable_adapter() if kind == "off" else nullcontext():
            yield wrapped
    finally:
        wrapped.unload()


def answer(model: PreTrainedModel, request: dict, tokenizer) -> tuple[int, int, list[str]]:
    """Tokens that were written, and of a greedy text ties and failures."""
    inputs = prompts(request, model.config.vocab_size, model.device)
    longest, failures = inputs["input_ids"].shape[1], []
    with adapted(model, request["adapter"]) as writer:
        torch.manual_seed(request["seed"])
        settings = inputs | asked(request, longest, tokenizer) | {"use_mtp": request["mode"] == "drafted"}
        heard = Heard() if request["mode"] == "streamed" else None
        text = writer.generate(**settings, streamer=heard)
        count = text.shape[1] - longest
        if heard is not None and not torch.equal(heard.tokens, text.cpu()):
            failures.append("what was streamed is not the text")
        most = request["stop"] if request["mode"] == "cancelled" else request["new"]
        if not 1 <= count <= most:
            failures.append(f"{count} new tokens, not 1 to {most}")
        if request["sampled"]:
            return text[:, longest:].numel(), 0, failures
        plain = writer.generate(**inputs, **asked(request, longest, tokenizer), disable_compile=True)
        ties, differences = compared(writer, text, plain, inputs["attention_mask"])
    return text[:, longest:].numel(), ties, failures + differences


def memory(model: PreTrainedModel) -> tuple[int, int]:
    """Bytes that are allocated, and those reserved that can't be given back, while nothing is kept for the next text.

    On a CPU the process's, twice.
    """
    forget(model)
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    resident = psutil.Process().memory_info().rss
    return resident, resident


def flat(samples: list[int]) -> bool:
    """Whether the second half's largest is that of the first, but for `GROWTH`."""
    half = (len(samples) + 1) // 2
    return max(samples[half:], default=0) <= max(samples[:half]) * (1 + GROWTH)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--shape", choices=SHAPES, default="olmoe-1b-7b")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="make this request alone, and no others")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = shape(args.shape, num_mtp_layers=1)
    model = build(hf_moe_model, config, device, DTYPES[args.dtype]).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    start, number, tokens, ties, failures = time.perf_counter(), args.only or 0, 0, 0, []
    kinds, samples = Counter(), []
    while (elapsed := time.perf_counter() - start) < 60 * args.minutes and len(failures) < FAILURES:
        request = draw(args.seed, number, MOST[args.shape], config.vocab_size)
        print(f"{elapsed:7.1f} s  {said(request)}", flush=True)
        try:
            count, tied, failed = answer(model, request, tokenizer)
        except (RuntimeError, ValueError) as error:
            count, tied, failed = 0, 0, [f"{type(error).__name__}: {error}"]
        for line in failed:
            failures.append(f"{said(request)}: {line}")
            print(f"           {line}", flush=True)
        tokens, ties, number = tokens + count, ties + tied, number + 1
        sampling = "sampled" if request["sampled"] else "greedy"
        kinds.update((request["mode"], sampling, f"adapter {request['adapter']}"))
        if args.only is not None:
            break
        if number % 5 == 0:
            samples.append((round(elapsed, 1), *memory(model)))
    report = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu", "shape": args.shape}
    versions = {"hf_moe": __version__, "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "peft": peft.__version__}
    report |= {"versions": versions, "dtype": args.dtype, "seed": args.seed}
    report |= {"minutes": round((time.perf_counter() - start) / 60, 2), "requests": number - (args.only or 0)}
    report |= {"kinds": dict(sorted(kinds.items())), "tokens": tokens, "ties": ties}
    report |= {"bound_of_ties": BOUNDS[model.dtype], "failures": failures}
    columns = dict(zip(("seconds", "allocated_bytes", "reserved_bytes"), zip(*samples, strict=True), strict=False))
    report |= {"memory": columns}
    report["flat"] = {name: flat(columns.get(f"{name}_bytes", [0])) for name in ("allocated", "reserved")}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    summary = ("requests", "kinds", "tokens", "ties", "flat")
    print({name: report[name] for name in summary}, *failures, sep="\n")
    sys.exit(1 if failures or (device == "cuda" and not all(report["flat"].values())) else 0)


if __name__ == "__main__":
    main()
