"""Tiny policies to train: a model beside its tokenizer, pairs and questions, and runs of the tiny recipes."""

import json
from pathlib import Path

from hf_moe.training.main import main

from .conftest import tiny_tokenizer, write_rows
from .models import hf_moe_biased

BYTES = {"vocab_size": 259, "max_position_embeddings": 256}
# Coefficients that are not to be used unless a recipe says so, and a selection bias that is not to move.
BALANCED = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1, "seq_aux_loss_coef": 0.2}
BALANCED |= {"router_bias_update_speed": 0.1}


def pairs(count: int) -> list[dict]:
    words = [("red", "a rose is red"), ("green", "no"), ("blue", "it is the sea")]
    return [
        {"prompt": f"Say {word} {'again ' * (i % 2)}", "chosen": word * (1 + i % 3), "rejected": other}
        for i, (word, other) in zip(range(count), words * count, strict=False)
    ]


def questions(count: int) -> list[dict]:
    return [{"question": f"What is {i}{' + 0' * (i % 3)}?", "answer": f"It is\n#### {i}"} for i in range(count)]


def save_model(folder: Path, model=None) -> Path:
    (model or hf_moe_biased(**BYTES, **BALANCED)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def run_tiny(stage: str, model: Path, output: Path, *extra) -> tuple[dict, list[dict]]:
    """The metrics of a run of a tiny recipe, and what it logged."""
    rows = write_rows(output.with_suffix(".jsonl"), {"dpo": pairs, "grpo": questions}[stage](11))
    given = ["--model_name_or_path", model, "--output_dir", output, "--train_data", rows, "--logging_steps", 1]
    metrics = main([f"tiny/{stage}", *map(str, given), "--disable_tqdm", "true", *map(str, extra)])
    checkpoints = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return metrics, json.loads((checkpoints[-1] / "trainer_state.json").read_text())["log_history"]
