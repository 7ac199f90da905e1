"""Losses of five short runs with fixed seeds, digit for digit: what a change of the code alone must leave as they are.

python tests/fixed_seed_losses.py before.json    # in a checkout of before
python tests/fixed_seed_losses.py after.json     # in one of after, on the same machine and with the same packages
cmp before.json after.json
"""

import itertools
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_moe.demo import DEMO_MODEL
from hf_moe.demo.text import postcard_rows, story

STEPS = 8
# A step logs every one of its numbers; all is computed on a CPU, in float32.
ARGUMENTS = ["--logging_steps", "1", "--save_strategy", "no", "--use_cpu", "true"]
# Recipe -> the columns of its rows, and what it takes besides.
RUNS = {
    "sft": ("messages", ["--max_steps", str(STEPS), "--gradient_accumulation_steps", "2"]),
    "large_sft": ("messages", ["--max_steps", str(STEPS)]),
    "pretrain": ("text", ["--from_scratch", "true", "--train_tokens", "8000"]),
    "dpo": ("preferences", ["--max_steps", str(STEPS)]),
    "grpo": ("prompts", ["--max_steps", str(STEPS), "--max_completion_length", "24"]),
}


def rows() -> dict[str, list[dict]]:
    """Rows of each kind."""
    chats = [row["messages"] for row in postcard_rows(64, held_out=False, seed=0)]
    return {
        "messages": [{"messages": chat} for chat in chats],
        "text": [{"text": "\n".join(story(random.Random(seed)))} for seed in range(200)],
        "preferences": [
            {"prompt": chat[:1], "chosen": chat[1:], "rejected": other[1:]}
            for chat, other in itertools.pairwise(chats)
        ],
        "prompts": [{"prompt": chat[:1]} for chat in chats],
    }


def untrained(model: Path, folder: Path) -> None:
    """The same model with random weights, and so with digits in what it writes: GRPO's reward counts those."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)


def losses(recipe: str, model: Path, folder: Path) -> list[dict]:
    """What each step of the recipe logs, but for times."""
    columns, further = RUNS[recipe]
    data, output = folder / f"{columns}.jsonl", folder / recipe
    places = ["--model_name_or_path", model, "--train_data", data, "--output_dir", output]
    command = [sys.executable, "-m", "hf_moe_cli", "train", f"tiny/{recipe}", *places, *ARGUMENTS, *further]
    subprocess.run([str(word) for word in command], check=True)
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    timed = ("time", "runtime", "per_second", "profiling")
    return [{k: v for k, v in entry.items() if not any(word in k for word in timed)} for entry in history]


def main(path: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, kind in rows().items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kind))
        upcycle = ["upcycle", DEMO_MODEL, folder / "moe", "--experts", "4", "--top-k", "2", "--no-verify"]
        subprocess.run([sys.executable, "-m", "hf_moe_cli", *(str(word) for word in upcycle)], check=True)
        untrained(folder / "moe", folder / "untrained")
        models = {"grpo": folder / "untrained"}
        found = {recipe: losses(recipe, models.get(recipe, folder / "moe"), folder) for recipe in RUNS}
    Path(path).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
