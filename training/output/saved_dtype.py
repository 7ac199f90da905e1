"""The type of the weights that a run saves in the end: they train in float32, and the source may be half as large."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, TrainingArguments

from hf_moe.model.router import in_float32
from hf_moe.reading import auto_config
from hf_moe.routers import BIASES

from .block_fp8 import to_blocks

DTYPES = ("auto", "bfloat16", "float16", "float32")
FP8 = torch.float8_e4m3fn  # in blocks of 128 x 128
SAVED = (*DTYPES, "fp8")
FUSED = ("hf_moe", "hf_moe_graft")


def dtype_to_save(model_args, args: TrainingArguments) -> torch.dtype | None:
    """What `save_dtype` means for this run; None where weights are saved as they train.

    "auto" is the type of the model that the run began with, wherever it is resumed, if the weights train in float32.
    """
    if model_args.save_dtype == "fp8":
        return FP8
    if model_args.save_dtype != "auto":
        return getattr(torch, model_args.save_dtype)
    if model_args.dtype != "float32":
        return None
    source = model_args.model_name_or_path
    config = auto_config(source, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code)
    return config.get_text_config().dtype or config.dtype or dtype_in_files(Path(source))


def dtype_in_files(folder: Path) -> torch.dtype | None:
    """Of the first weight in a folder whose configuration does not say it."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (no dict)
                if (dtype := file.get_tensor(name).dtype).is_floating_point:
                    return dtype
    return None


def cast(
    state: dict[str, torch.Tensor], dtype: torch.dtype, model: nn.Module | None = None
) -> dict[str, torch.Tensor]:
    """`state` in `dtype`, but for selection biases, whose steps it could not hold, and what routers of `model` keep in
    float32; tied weights stay one tensor."""
    dtype = as_written(dtype)
    kept = (*BIASES, *(() if model is None else in_float32(model)))
    done = {}
    for x in state.values():
        if x.is_floating_point() and place(x) not in done:
            done[place(x)] = x.to(dtype)
    return {
        name: done[place(x)] if x.is_floating_point() and not name.endswith(kept) else x for name, x in state.items()
    }


def check_saved(config: PreTrainedConfig, save_dtype: str) -> None:
    """Raises ValueError where a model's files cannot be in block FP8, which is a format of single matrices."""
    if save_dtype == "fp8" and config.model_type in FUSED:
        raise ValueError(
            f"save_dtype is fp8, whose files hold each expert by itself, and those of {config.model_type} all experts "
            "together: save in bfloat16, or let hf-moe export write the model's family first."
        )


def as_written(dtype: torch.dtype) -> torch.dtype:
    """The type in which weights leave the model; block FP8 is made of files in bfloat16."""
    return torch.bfloat16 if dtype == FP8 else dtype


def finish(folder: str | Path, dtype: torch.dtype) -> None:
    """After a model was saved in `dtype`: its configuration says so, and its files are in blocks where that is FP8."""
    name_dtype(folder, as_written(dtype))
    if dtype == FP8:
        to_blocks(folder)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def place(tensor: torch.Tensor) -> tuple:
    """The same for weights that are tied, and for no others."""
    return tensor.data_ptr() or id(tensor), tensor.shape


def name_dtype(folder: str | Path, dtype: torch.dtype) -> None:
    """Say in the configuration in `folder` what its weights are; Transformers wrote what the model trains in."""
    path = Path(folder) / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *(x for x in config.values() if isinstance(x, dict))):
        if part.get("dtype") is not None or part is config:
            part["dtype"] = name_of(dtype)
    aside = path.with_name(".config.json")
    aside.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    aside.replace(path)
