"""A run on text leaves alone how a model reads pictures, and what it saves reads them as before."""

import inspect
import shutil
from pathlib import Path

from transformers import PreTrainedModel

from hf_moe.reading import PROCESSOR_FILES

from ..host import loaded_from
from .record import snapshot


def carry_processor(model: PreTrainedModel, folder: str | Path) -> None:
    """Copy the processor's files of what `model` was loaded from to `folder`; nothing of one that reads text alone."""
    source, commit = loaded_from(model.config)
    if not source or "pixel_values" not in inspect.signature(model.forward).parameters:
        return
    there = Path(source) if Path(source).is_dir() else snapshot(source, commit, PROCESSOR_FILES)
    for name in PROCESSOR_FILES:
        if (there / name).is_file() and not (Path(folder) / name).exists():
            shutil.copyfile(there / name, Path(folder) / name)
