"""Checkpoints: complete or not, and every weight back, or an error that names the first one missing."""

import json
from pathlib import Path
from zipfile import is_zipfile

from safetensors import SafetensorError, safe_open
from torch import nn

from ..host import PREFIX_CHECKPOINT_DIR, SCHEDULER_NAME, TRAINER_STATE_NAME

ADAPTER_FILE = "adapter_model.safetensors"


def check_adapter(path: str | Path, model: nn.Module) -> None:
    """Raises ValueError where the adapter in `path` lacks a weight of the PEFT model, which PEFT would leave as it is.

    Also where one has another size.
    """
    from peft import get_peft_model_state_dict

    try:
        with safe_open(Path(path) / ADAPTER_FILE, framework="pt") as file:
            names = file.keys()
            saved = {name: file.get_slice(name).get_shape() for name in names}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} has no adapter that can be read: {error}") from error
    expected = {name: list(weight.shape) for name, weight in get_peft_model_state_dict(model).items()}
    missing = sorted(expected.keys() - saved.keys())
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of the adapter's weights, the first of them {missing[0]}.")
    wrong = sorted(name for name, shape in expected.items() if saved[name] != shape)
    if wrong:
        raise ValueError(
            f"{path} has {len(wrong)} of the adapter's weights in another size, the first of them {wrong[0]}: "
            f"{saved[wrong[0]]} for {expected[wrong[0]]}."
        )


def is_complete(checkpoint: str | Path) -> bool:
    """Whether a checkpoint was written to its end: the Trainer writes its state file last."""
    try:
        json.loads((Path(checkpoint) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def check_optimizer(checkpoint: str | Path) -> None:
    """Raises ValueError where a checkpoint holds no whole state of the optimizer, its schedule and random numbers.

    Without one of the first two the Trainer would begin with a new one of both.
    """
    folder = Path(checkpoint)
    # DeepSpeed has its own folder for both; all else is called optimizer.pt, optimizer.bin or optimizer_0.
    spread = any(folder.glob("global_step*"))
    for what, name in (("optimizer", "optimizer*"), ("schedule", SCHEDULER_NAME)):
        if not spread and not any(folder.glob(name)):
            raise ValueError(
                f"{checkpoint} has no state of the {what}, so that no run can go on from it as it was "
                "(save_only_model leaves it out): give it as --model_name_or_path of a new run."
            )
    for path in sorted([*folder.glob("*.pt"), *folder.glob("rng_state*.pth")]):
        if not is_zipfile(path):  # as PyTorch's files are; the end of one says what is in it
            raise ValueError(
                f"{path} is cut short, so that no run can go on from it as it was: resume from another checkpoint, or "
                "give this one as --model_name_or_path of a new run."
            )


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint in `folder`; one that a kill cut short does not count."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    steps = [path.name.removeprefix(prefix) for path in Path(folder).glob(f"{prefix}*")]
    newest_first = sorted((int(step) for step in steps if step.isdigit()), reverse=True)
    checkpoints = (Path(folder) / f"{prefix}{step}" for step in newest_first)
    return next((str(checkpoint) for checkpoint in checkpoints if is_complete(checkpoint)), None)
