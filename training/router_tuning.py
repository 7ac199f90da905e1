"""The routers of a model trained alone on a text, as where an expert has joined that they know from elsewhere."""

from pathlib import Path

import torch

from hf_moe.reading import auto_config, positions

from .main import train

RECIPE = "tiny/continue"  # continued pretraining without anything that is about a size
STEPS = 50  # optimizer steps that the tokens are cut into, unless a step would have less than a row
LENGTH = 512  # tokens of a row
LEARNING_RATE = 1e-3


def tune_router(model: str | Path, text: str | Path, out: str | Path, tokens: int) -> dict[str, float]:
    """Train the routers of the model in a folder on so many tokens, and save it to `out`; every other tensor stays bit
    for bit. Returns the metrics.

    text: rows with a column text, or a text whose lines are rows. Raises ValueError or OSError of one line.
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
