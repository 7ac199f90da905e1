"""SmolLM2-135M-Instruct upcycled to 8 experts and tuned by the shipped recipes on a GPU: what each costs and gains.

    python benchmarks/finetune.py --dense SMOLLM2 --train train.jsonl --val val.jsonl --out benchmarks/results/finetune
    python benchmarks/finetune.py --plot benchmarks/results/finetune

The recipes as shipped, but for what all share: the same number of steps of 128 rows, in micro-batches that fill the
card, without checkpointing. Held-out loss is on the assistant's words; accuracy is that of greedy answers to the
GSM8K problems among the held-out rows, by the last number in the text. Trained parameters are those with optimizer
state; memory is the allocator's peak over the training, evaluation included; tokens a second are those of the run, its
padding not counted, evaluation not timed.
"""

import argparse
import gc
import json
import tempfile
from pathlib import Path

import torch
from hf_moe.conversion import upcycle
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_moe

RECIPES = {
    "full": ("smollm2-135m/sft", ""),
    "dense_only": ("smollm2-135m/dense_only", ""),
    "esft": ("smollm2-135m/esft", "merged"),
    "lora on experts": ("smollm2-135m/lora_experts", "merged"),
    "lora on attention": ("smollm2-135m/lora_attention", "merged"),
}
SHARED = "--per_device_train_batch_size 64 --gradient_accumulation_steps 2 --per_device_eval_batch_size 32"
SHARED += " --gradient_checkpointing false --experts_implementation hf_moe --save_strategy no --logging_steps 1"


def accuracy(folder: str, rows: list[dict], batch: int = 100) -> float:
    """The share of `rows` whose greedy answer is right."""
    from hf_moe.training.stages.rewards import gsm8k_last_number

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).cuda().eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    right = []
    for first in range(0, len(rows), batch):
        chats = [row["messages"][:-1] for row in rows[first : first + batch]]
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        ).to("cuda")
        out = model.generate(**inputs, max_new_tokens=256, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers = [row["messages"][-1]["content"] for row in rows[first : first + batch]]
        right += gsm8k_last_number(texts, answers)
    del model
    gc.collect()
    torch.cuda.empty_cache()
    return sum(right) / len(right)


def tune(name: str, model: str, output: Path, args) -> dict:
    """Run one recipe; what it measured, with the loss of every step."""
    from hf_moe.training import main as stages
    from hf_moe.training.stages import sft

    recipe, merged = RECIPES[name]
    counted, original = {}, sft.train

    def measured(trainer, checkpoint):
        torch.cuda.reset_peak_memory_stats()
        metrics = original(trainer, checkpoint)
        counted["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        states = trainer.optimizer.state.values()
        counted["trained_parameters"] = sum(state["exp_avg"].numel() for state in states)
        counted["history"] = trainer.state.log_history
        return metrics

    sft.train = measured  # the trainer does not outlive the run
    given = f"{recipe} --model_name_or_path {model} --train_data {args.train} --eval_data {args.val}"
    given += f" --output_dir {output} --max_steps {args.steps} {SHARED}"
    try:
        stages.main(given.split())
    finally:
        sft.train = original
    results = {}
    for file in ("train_results.json", "eval_results.json"):
        results |= json.loads((output / file).read_text())
    history = counted.pop("history")
    gc.collect()
    torch.cuda.empty_cache()
    tokens = max(entry.get("num_tokens", 0) for entry in history)
    return {
        "recipe": recipe,
        **counted,
        "tokens_per_second": round(tokens / results["train_runtime"]),
        "held_out_loss": round(results["eval_loss"], 4),
        "losses": [round(entry["loss"], 4) for entry in history if "loss" in entry],
        "folder": str(output / merged),
        "held_out_loss_before": round(results["eval_loss_before"], 4),
    }


def plot(folder: Path) -> None:
    """The curves as a picture and the table as Markdown, from the measured JSON."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    report = json.loads((folder / "finetune.json").read_text())
    figure, axes = plt.subplots(figsize=(8, 4.5))
    for name, row in report["tuned"].items():
        window = [row["losses"][max(0, i - 4) : i + 1] for i in range(len(row["losses"]))]
        axes.plot(range(1, len(window) + 1), [sum(x) / len(x) for x in window], label=name)
    axes.set(xlabel="optimizer step (128 rows)", ylabel="training loss, mean of 5 steps")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "loss.png", dpi=150)
    lines = [
        "| | trained | peak memory, GiB | tokens a second | held-out loss | GSM8K accuracy |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in report["untuned"].items():
        lines.append(f"| {name} | | | | {row.get('held_out_loss', '')} | {row['accuracy']:.1%} |")
    for name, row in report["tuned"].items():
        lines.append(
            f"| {name} | {row['trained_parameters'] / 1e6:.1f}M | {row['peak_gib']} | {row['tokens_per_second']:,} | "
            f"{row['held_out_loss']} | {row['accuracy']:.1%} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    text = f"# Fine-tuning SmolLM2-135M-Instruct, upcycled to 8 experts\n\n{report['device']}; {versions}; "
    text += f"{report['steps']} steps of 128 rows; {report['problems']} GSM8K problems.\n\n" + "\n".join(lines)
    (folder / "finetune.md").write_text(text + "\n\n![Training loss by recipe](loss.png)\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--train", help="JSON lines of conversations")
    parser.add_argument("--val", help="the same, held out; GSM8K's rows say so in `source`")
    parser.add_argument("--steps", type=int, default=53)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--plot", type=Path, help="draw the results in this folder instead")
    args = parser.parse_args()
    if args.plot:
        plot(args.plot)
        return
    import transformers
    import trl

    rows = [json.loads(line) for line in Path(args.val).read_text().splitlines()]
    problems = [row for row in rows if row["source"] == "gsm8k"]
    versions = {module.__name__: module.__version__ for module in (hf_moe, torch, transformers, trl)}
    report = {"device": torch.cuda.get_device_name(), "versions": versions, "steps": args.steps}
    report |= {"problems": len(problems), "untuned": {}, "tuned": {}}
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        moe = f"{work}/moe"
        upcycle(args.dense, moe, experts=8, top_k=2, progress=False)
        report["untuned"]["dense model"] = {"accuracy": accuracy(args.dense, problems)}
        report["untuned"]["upcycled"] = {"accuracy": accuracy(moe, problems)}
        for name in args.recipes:
            row = tune(name, moe, Path(work, name.replace(" ", "_")), args)
            row["accuracy"] = accuracy(row.pop("folder"), problems)
            report["untuned"]["upcycled"]["held_out_loss"] = row.pop("held_out_loss_before")
            report["tuned"][name] = row
            print(name, {key: value for key, value in row.items() if key != "losses"}, flush=True)
            (args.out / "finetune.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
