"""Experts exchanged and then the routers trained alone, as where one has joined that they know from elsewhere."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from hf_moe.conversion import exchange_experts
from hf_moe.conversion.files.texts import name_of
from hf_moe.conversion.files.tokenizer import load_tokenizer
from hf_moe.conversion.reshape.model import open_mixture

from hf_moe.hub import RECORD, stages_of, write_model_card
from hf_moe.hub.folder import read_folder
from hf_moe.reading import auto_config, positions
from hf_moe.staging import check_destination, publish
from hf_moe.texts import texts

from .main import train
from .output.record import is_hub_data

RECIPE = "tiny/continue"  # continued pretraining without anything that is about a size
STEPS = 50  # optimizer steps that the tokens are cut into, unless a step would have less than a row
LENGTH = 512  # tokens of a row
LEARNING_RATE = 1e-3


def exchange_and_tune(
    src: str | Path, dst: str | Path, text: str | Path, tokens: int, *, resume: bool = False, **exchange: Any
) -> dict[str, Any]:
    """`exchange_experts`, then the routers trained on so many tokens of a text; every other tensor stays bit for bit.

    text: a file or a folder of text or rows (texts, conversations, or prompts with completions), or a data set's name
    on the Hub. resume: after a kill go on with an exchange that was not complete; else begin anew. The rest is as
    there.

    Returns its report with the metrics of the training. Raises a ValueError or OSError of one line; then there is no
    output.
    """
    dst = check_destination(Path(dst), resume)
    untuned, tuned = (dst.with_name(f".{dst.name}.{name}") for name in ("untuned", "tuned"))
    for folder in (untuned, tuned):
        if folder.exists() and not resume:
            raise FileExistsError(
                f"{folder} is left of what was stopped; begin anew with resume=True (--resume), or remove that folder."
            )
        shutil.rmtree(folder, ignore_errors=True)
    with tempfile.TemporaryDirectory() as aside:
        rows = Path(aside) / "rows.jsonl"
        rows.write_text("".join(json.dumps({"text": row}) + "\n" for row in first(src, text, tokens)))
        if exchange.get("dry_run"):
            return exchange_experts(src, dst, resume=resume, **exchange)
        try:
            report = exchange_experts(src, untuned, resume=resume, **exchange)
            metrics = tune_router(untuned, rows, tuned, tokens)
            describe(tuned, untuned, report["source"], text, dst.name)
            shutil.rmtree(untuned)
            publish(tuned, dst)
        except BaseException:
            for folder in (untuned, tuned):
                shutil.rmtree(folder, ignore_errors=True)
            raise
    return report | {"output": str(dst)} | metrics


def first(src: str | Path, text: str | Path, tokens: int) -> Iterator[str]:
    """What a text begins with, up to so many tokens of the model's. Raises ValueError or OSError of one line."""
    source = open_mixture(src).source
    tokenizer = load_tokenizer(source.checkpoint.folder)
    if tokenizer is None:
        raise ValueError(f"{source.name} has no tokenizer to read {text} with.")
    if tokens < 1:
        raise ValueError(f"tune_tokens is {tokens}; it must be at least 1.")
    left = tokens
    for row in texts(str(text), tokenizer):
        if row.strip():
            yield row
            left -= len(tokenizer(row, verbose=False).input_ids)
        if left <= 0:
            return
    if left == tokens:
        raise ValueError(f"The text {text} to tune the routers on is empty.")


def tune_router(model: str | Path, text: str | Path, out: str | Path, tokens: int) -> dict[str, float]:
    """Train the routers of the model in a folder on so many tokens, and save it to `out`; returns the metrics.

    text: rows with a column text. Raises ValueError or OSError of one line.
    """
    length = positions(auto_config(model).get_text_config(), LENGTH)
    on_gpu = torch.cuda.is_available()
    run = train(
        RECIPE,
        model,
        train_data=text,
        output_dir=out,
        trainable="router_only",
        learning_rate=LEARNING_RATE,
        train_tokens=tokens,
        batch_tokens=max(length, tokens // STEPS),
        per_device_train_batch_size=1,
        max_length=length,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        save_strategy="no",
    )
    return run.metrics


def describe(folder: Path, model: Path, source: str, text: str | Path, name: str) -> None:
    """Have the record and the card of what was trained name `source` and the text, not the folders of the way here."""
    stages = stages_of(folder)
    stages[-1] |= {"base_model": source, "train_data": [name_of(text)]}
    if is_hub_data(str(text)):
        stages[-1]["datasets"] = [str(text)]
    (folder / RECORD).write_text(json.dumps({"stages": stages}, indent=2) + "\n", encoding="utf-8")
    write_model_card(folder, name=name, provenance=read_folder(model).provenance)
