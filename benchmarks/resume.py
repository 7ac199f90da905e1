"""A run on several GPUs that is stopped and goes on, beside one that is not: losses and weights, through the command.

    python benchmarks/resume.py --work DIR --out benchmarks/results/resume.json

OLMoE-1B-7B's layers, two of them, with 16 experts, random weights; the recipe olmoe-1b-7b/sft as it is for four
steps, with a checkpoint after two. `resumed` goes on from that checkpoint, in another folder. `again` is the whole run
a second time: what the card itself does not compute twice alike shows there.
"""

import argparse
import json
import shutil
import subprocess
from pathlib import Path

import recipe_speed
import torch
from hf_moe.training.data.chat_templates import find_template
from safetensors import safe_open
from transformers import AutoTokenizer

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.demo import DEMO_MODEL

SHAPE = {"num_hidden_layers": 2, "num_experts": 16, "layer_types": None, "mlp_layer_types": None}
STEPS, SAVED = 4, 2
LAUNCHES = {
    "fsdp2": ["--accelerate", "fsdp2"],
    "expert_parallel": ["--accelerate", "expert_parallel", "--expert_parallel_size", "2"],
}


def build(folder: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    with torch.device("cuda"):
        model = HfMoeForCausalLM(HfMoeConfig.from_preset("olmoe-1b-7b", **SHAPE)).to(torch.bfloat16)
        recipe_speed.even_routers(model, recipe_speed.some_tokens(tokenizer))
    model.save_pretrained(folder)
    tokenizer.chat_template = Path(find_template("olmoe")).read_text()
    tokenizer.save_pretrained(folder)
    recipe_speed.write_data(folder.parent / "chats.jsonl", 20_000, tokenizer)


def train(work: Path, name: str, *words: str) -> Path:
    """The recipe for STEPS steps into a folder of that name."""
    output = work / name
    shutil.rmtree(output, ignore_errors=True)
    given = {
        "model_name_or_path": work / "model",
        "train_data": work / "chats.jsonl",
        "output_dir": output,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVED,
    }
    said = [str(word) for key, value in given.items() for word in (f"--{key}", value)]
    subprocess.run([*recipe_speed.TRAIN, "olmoe-1b-7b/sft", *said, *words], check=True)
    return output


def losses(output: Path) -> list[float]:
    """Of the last steps: those that a resumed run computes."""
    logs = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [entry["loss"] for entry in logs if "loss" in entry][-(STEPS - SAVED) :]


def difference(one: Path, other: Path) -> float:
    """The largest between two numbers of the last checkpoints: weights, in float32, and what lies beside them."""
    largest, last = 0.0, f"checkpoint-{STEPS}"
    for path in sorted((one / last).rglob("*.safetensors")):
        with safe_open(path, "pt") as first, safe_open(other / path.relative_to(one), "pt") as second:
            for name in first.keys():  # noqa: SIM118
                gap = first.get_tensor(name).float() - second.get_tensor(name).float()
                largest = max(largest, gap.abs().max().item())
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--launches", nargs="+", choices=LAUNCHES, default=list(LAUNCHES))
    parser.add_argument("--further", nargs=argparse.REMAINDER, default=[], help="arguments of every run")
    args = parser.parse_args()
    if not (args.work / "model").exists():
        args.work.mkdir(parents=True, exist_ok=True)
        build(args.work / "model")
    runs = {}
    report = {"device": torch.cuda.get_device_name(), "gpus": torch.cuda.device_count()}
    report |= {"versions": recipe_speed.versions(), "further": args.further, "runs": runs}
    for name in args.launches:
        words = [*LAUNCHES[name], *args.further]
        whole = train(args.work, "whole", *words)
        runs[name] = {"losses": losses(whole)}
        goes_on = ["--resume_from_checkpoint", str(whole / f"checkpoint-{SAVED}")]
        for other, further in (("resumed", goes_on), ("again", [])):
            output = train(args.work, other, *words, *further)
            runs[name][other] = {"losses": losses(output), "largest_difference": difference(whole, output)}
            print(name, runs[name], flush=True)
            args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
