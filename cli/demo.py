"""`hf-moe demo`: from a dense checkpoint to a Hub-ready mixture of experts, with the functions behind the commands."""

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NamedTuple, TextIO

import typer

from .convert import TOLERANCE
from .generate import continue_text, encode, load
from .output import hide_loading_bars, messages_on_stderr

EXPERTS, TOP_K = 8, 2
MAX_NEW_TOKENS = 160
REPEATED = 5  # words that come again one after the other, more than twice: a model that has lost its thread
STORY = "Once upon a time"
RECIPE = """\
# Postcards for a model that has read nothing but stories.
model_name_or_path: {folder}/upcycled
train_data: [{folder}/data/train.jsonl]
eval_data: [{folder}/data/held_out.jsonl]
output_dir: {folder}/tuned

max_steps: {steps}
per_device_train_batch_size: 16
learning_rate: 3.0e-3
lr_scheduler_type: cosine
warmup_steps: 5
max_length: 160
assistant_only_loss: true

logging_steps: 20
save_strategy: "no"
report_to: none
disable_tqdm: true
bf16: false
activation_checkpointing: false
seed: 0
"""


def demo(
    out: Annotated[Path, typer.Option(help="The folder to write; it must be new or empty.")] = Path("hf_moe_demo"),
) -> None:
    """Upcycle, compare, fine-tune, generate and save a tiny model that comes along, in under three minutes."""
    # Said before the first import that reads it: the demo asks the Hub for nothing.
    os.environ["HF_HUB_OFFLINE"] = "1"
    run_demo(out)


def run_demo(out: Path, steps: int = 120) -> None:
    """The demo with `steps` steps of fine-tuning. `out` appears only when all of it is there.

    Raises FileExistsError if `out` holds something, typer.Exit(1) after one line where a step's result is not what it
    should be.
    """
    import torch

    from hf_moe.staging import staged

    # The model is too small to be shared between threads: they would wait for each other.
    torch.set_num_threads(1)
    hide_loading_bars()
    start = time.perf_counter()
    with staged(out) as folder:
        upcycle_step(folder, out)
        before = postcard_text(folder / "upcycled")
        losses = train_step(folder, out, steps)
        result_step(before, postcard_text(folder / "tuned"), losses)
        card_step(folder, out)
    print(f"\nDone in {time.perf_counter() - start:.0f} s. To run a step again, give it another folder:\n")
    print(f"    hf-moe train {out}/recipe.yaml --output_dir {out}/tuned_again")
    print("\nTo load the result anywhere:\n")
    print("    from transformers import AutoModelForCausalLM, AutoTokenizer")
    print(f'    tokenizer = AutoTokenizer.from_pretrained("{out}/tuned", trust_remote_code=True)')
    print(f'    model = AutoModelForCausalLM.from_pretrained("{out}/tuned", trust_remote_code=True)')


def upcycle_step(folder: Path, out: Path) -> None:
    """Dense model to mixture of experts; both tell the same story."""
    from hf_moe.conversion import upcycle

    from hf_moe.demo import DEMO_MODEL

    heading(1, "Turn the dense model that comes with hf_moe into a mixture of experts")
    command("upcycle", str(DEMO_MODEL), f"{out}/upcycled", "--experts", str(EXPERTS), "--top-k", str(TOP_K))
    with messages_on_stderr():
        report = upcycle(DEMO_MODEL, folder / "upcycled", experts=EXPERTS, top_k=TOP_K, progress=False)
        dense, sparse = (written(model, STORY) for model in (DEMO_MODEL, folder / "upcycled"))
    print(f"{report['total_params']:,} parameters, {report['active_params']:,} of them work on each token.")

    heading(2, "Compare: before any training it computes what the dense model computes")
    command("verify", str(DEMO_MODEL), f"{out}/upcycled")
    print(
        f"Largest difference between two logits: {report['max_abs_diff']:.1e} (at most {TOLERANCE:.0e} is asked for)."
    )
    expect(report["max_abs_diff"] <= TOLERANCE, f"the logits differ by up to {report['max_abs_diff']:.3g}")
    command("generate", f"{out}/upcycled", "--prompt", STORY)
    print(STORY + sparse.text)
    expect(dense.same_without_cache, "the dense model writes another text with a cache than without")
    expect(sparse.same_without_cache, "the mixture of experts writes another text with a cache than without")
    expect(dense.text == sparse.text, f"the dense model tells another story: {STORY}{dense.text}")
    print("(The dense model tells the same story.)")


def train_step(folder: Path, out: Path, steps: int) -> dict:
    """A short supervised fine-tuning on another kind of text; the losses before and after."""
    from hf_moe.demo.text import postcard_rows

    heading(3, "Fine-tune it on postcards; it has read nothing but stories so far")
    (folder / "data").mkdir()
    write_rows(folder / "data" / "train.jsonl", postcard_rows(steps * 16, held_out=False, seed=1))
    write_rows(folder / "data" / "held_out.jsonl", postcard_rows(64, held_out=True, seed=2))
    (folder / "recipe.yaml").write_text(RECIPE.format(folder=out, steps=steps), encoding="utf-8")
    command("train", f"{out}/recipe.yaml")
    with messages_on_stderr(), contextlib.redirect_stderr(Renaming(sys.stderr, str(folder), str(out))):
        import datasets
        from hf_moe.training.main import main

        datasets.disable_progress_bars()
        # The recipe names the folder as it will be called; until then it has another name.
        places = ["--model_name_or_path", f"{folder}/upcycled", "--output_dir", f"{folder}/tuned"]
        places += ["--train_data", f"{folder}/data/train.jsonl", "--eval_data", f"{folder}/data/held_out.jsonl"]
        return main([f"{folder}/recipe.yaml", *places])


def result_step(before: "Written", after: "Written", losses: dict) -> None:
    heading(4, "Look at what it learnt, on postcards between people whose pairs it was not trained on")
    print(f"Held-out loss: {losses['eval_loss_before']:.3f} before, {losses['eval_loss']:.3f} after.")
    print(f"\nPrompt: {held_out_prompt()}\n\nBefore:\n{indented(before.text)}\n\nAfter:\n{indented(after.text)}")
    expect(losses["eval_loss"] < losses["eval_loss_before"], "the held-out loss did not fall")
    expect(after.same_without_cache, "the tuned model writes another text with a cache than without")
    expect(after.ended, f"the tuned model's text did not end within {MAX_NEW_TOKENS} tokens")
    expect(not repeats(after.text), "the tuned model repeats itself")


def card_step(folder: Path, out: Path) -> None:
    from hf_moe.hub import write_model_card

    heading(5, "Save it ready for the Hub: weights, model code, tokenizer, model card")
    for name in ("upcycled", "tuned"):
        command("card", f"{out}/{name}")
        write_model_card(folder / name)
    for file in sorted((folder / "tuned").rglob("*")):
        if file.is_file():
            print(f"{file.stat().st_size:>12,}  {out}/{file.relative_to(folder)}")


def postcard_text(model: Path) -> "Written":
    with messages_on_stderr():
        return written(model, held_out_prompt(), chat=True)


def held_out_prompt() -> str:
    from hf_moe.demo.text import postcard_rows

    return postcard_rows(1, held_out=True, seed=3)[0]["messages"][0]["content"]


class Written(NamedTuple):
    """What a model wrote greedily, whether it came to an end, and whether it is the text without a cache, too."""

    text: str
    ended: bool
    same_without_cache: bool


def written(folder: Path, prompt: str, chat: bool = False) -> Written:
    from hf_moe.generation.cached import with_and_without_cache

    model, tokenizer = load(folder)
    inputs = encode(tokenizer, prompt, chat)
    report = continue_text(model, tokenizer, inputs, max_new_tokens=MAX_NEW_TOKENS)
    same = with_and_without_cache(model, inputs["input_ids"].to(model.device), report["new_tokens"]).same
    return Written(report["text"], report["new_tokens"] < MAX_NEW_TOKENS, same)


def repeats(text: str) -> bool:
    words = text.split()
    runs = [tuple(words[i : i + REPEATED]) for i in range(len(words) - REPEATED + 1)]
    return any(runs.count(run) > 2 for run in runs)


def expect(true: bool, otherwise: str) -> None:
    """End with exit code 1 and one line where what a step shows is not so."""
    if not true:
        print(f"hf-moe: the demo went wrong: {otherwise}; hf-moe check tells more.", file=sys.stderr)
        raise typer.Exit(1)


class Renaming:
    """A stream on which a folder has the name that it will get."""

    def __init__(self, stream: TextIO, now: str, later: str):
        self.stream, self.now, self.later = stream, now, later

    def write(self, text: str) -> int:
        self.stream.write(text.replace(self.now, self.later))
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def heading(number: int, title: str) -> None:
    print(f"\n{number}/5  {title}\n", flush=True)


def command(*words: str) -> None:
    print("$ hf-moe " + " ".join(f'"{word}"' if " " in word else word for word in words), flush=True)


def indented(block: str) -> str:
    return "\n".join("    " + line for line in block.splitlines())
