"""What a run was: its model, its data and its seed, written down beside every model that it saves."""

import contextlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from hf_moe.hub import RECORD, inherited, stages_of
from hf_moe.staging import written_aside
from hf_moe.version import __version__

from ..host import loaded_from

# Arguments of a recipe that are a record's as they are.
ARGUMENTS = ("stage", "seed", "from_scratch", "lora_base")
DATA = ("train_data", "eval_data")
UNRELATED = 0.1  # the cosine of two matrices, which random ones do not reach


def describe(given: dict[str, Any]) -> dict[str, Any]:
    """A recipe's arguments -> what a record says of them; of files and folders here, their names alone."""
    facts = {"stage": "sft"} | {name: given[name] for name in ARGUMENTS if told(given.get(name))}
    for name in DATA:
        if given.get(name):
            facts[name] = [Path(source).name if Path(source).exists() else source for source in given[name]]
    facts["datasets"] = [source for name in DATA for source in given.get(name) or [] if is_hub_data(source)]
    return facts | {"base_model": given["model_name_or_path"]}


def told(value: Any) -> bool:
    return value is not None and value is not False


def is_hub_data(source: str) -> bool:
    return not Path(source).exists() and source.count("/") <= 1 and not Path(source).suffix


def stages(facts: dict[str, Any], model: PreTrainedModel) -> list[dict[str, Any]]:
    """All stages that `model` has been through, this one last. facts: of `describe`, or nothing.

    Weights that were drawn anew started from nothing: of the model beside them the record names the configuration.
    """
    source, commit = loaded_from(model.config)
    base = str(facts.get("base_model") or source)
    folder = Path(base)
    here = bool(base) and folder.is_dir()
    anew = facts.get("from_scratch", False)
    name, revision = ("configuration", "configuration_revision") if anew else ("base_model", "base_revision")
    stage = {key: value for key, value in facts.items() if key not in ("from_scratch", "base_model")}
    stage |= {name: folder.resolve().name if here else base, revision: None if here else commit}
    known = {key: value for key, value in stage.items() if value not in (None, "", [])}
    if not known:
        return []  # a model that was made here
    if not here and stage[revision] is None:  # resumed: the checkpoint knows
        earlier = stages_of(Path(source))
        if earlier and earlier[-1].get(name) == base:
            return earlier
    if anew:
        return [{**known, "weights": "drawn anew", "hf_moe_version": __version__}]
    if not here:
        folder = snapshot(base, stage[revision])
    return [*stages_of(folder), {**known, **inherited(folder), "hf_moe_version": __version__}]


def facts_of(model: nn.Module, args: TrainingArguments) -> dict[str, Any]:
    """What a recipe says of the run; without one, whether `model` begins with weights of its own, which is printed.

    Its configuration then says no more what it was made from.
    """
    facts = getattr(args, "facts", {})
    if facts or not isinstance(model, PreTrainedModel) or not drawn_anew(model):
        return facts
    source = loaded_from(model.config)[0]
    print(f"the model has the configuration of {source}, and weights of its own: so says its record", file=sys.stderr)
    if getattr(model.config, "provenance", None) is not None:
        model.config.provenance = None
    return {"from_scratch": True}


@torch.no_grad()
def drawn_anew(model: PreTrainedModel) -> bool:
    """Whether `model` has the configuration of a folder here, and weights that have nothing to do with those in it.

    By the cosine of the first matrix that both have in one size: 1 where it was loaded, far from 0 where it was
    changed since. False where nothing can be compared, as where each process holds a part.
    """
    for path in sorted(Path(loaded_from(model.config)[0] or "absent").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            for name, weight in model.named_parameters():
                sharded = hasattr(weight, "placements")
                if name not in stored or sharded or weight.dim() < 2:
                    continue
                theirs = file.get_tensor(name)
                if theirs.shape == weight.shape and theirs.is_floating_point() and theirs.dtype.itemsize > 1:
                    ours = weight.detach().cpu().float().flatten()
                    return bool(nn.functional.cosine_similarity(ours, theirs.float().flatten(), dim=0) < UNRELATED)
    return False


def snapshot(base: str, revision: str | None, names: Iterable[str] = ("README.md", RECORD)) -> Path:
    """A folder with what a model of the Hub says of itself; it stays empty where that cannot be had."""
    folder = Path(
        constants.HF_HUB_CACHE, repo_folder_name(repo_id=base, repo_type="model"), "snapshots", str(revision)
    )
    if revision is not None:
        for name in names:
            with contextlib.suppress(OSError, EntryNotFoundError):
                hf_hub_download(base, name, revision=revision)
    return folder


def write_record(facts: dict[str, Any], model: PreTrainedModel, folder: str | Path) -> None:
    """Write the stages that `model` has been through to `folder`; nothing where nothing is known."""
    found = stages(facts, model)
    if found:
        with written_aside(Path(folder) / RECORD) as aside:
            aside.write_text(json.dumps({"stages": found}, indent=2) + "\n", encoding="utf-8")
