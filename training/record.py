"""What a run was: its model, its data and its seed, written down beside every model that it saves."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.file_download import repo_folder_name
from transformers import PreTrainedModel

from hf_moe.hub import RECORD, inherited, stages_of
from hf_moe.version import __version__

from .host import loaded_from

# Arguments of a recipe that are a record's as they are.
ARGUMENTS = ("stage", "seed")
DATA = ("train_data", "eval_data")


def describe(given: dict[str, Any]) -> dict[str, Any]:
    """A recipe's arguments -> what a record says of them; of files and folders here, their names alone."""
    facts = {"stage": "sft"} | {name: given[name] for name in ARGUMENTS if given.get(name) is not None}
    for name in DATA:
        if given.get(name):
            facts[name] = [Path(source).name if Path(source).exists() else source for source in given[name]]
    facts["datasets"] = [source for name in DATA for source in given.get(name) or [] if is_hub_data(source)]
    return facts | {"base_model": given["model_name_or_path"]}


def is_hub_data(source: str) -> bool:
    return not Path(source).exists() and source.count("/") <= 1 and not Path(source).suffix


def stages(facts: dict[str, Any], model: PreTrainedModel) -> list[dict[str, Any]]:
    """All stages that `model` has been through, this one last. facts: of `describe`, or nothing."""
    source, commit = loaded_from(model.config)
    base = str(facts.get("base_model") or source)
    folder = Path(base)
    here = bool(base) and folder.is_dir()
    stage = {**facts, "base_model": folder.resolve().name if here else base}
    stage["base_revision"] = None if here else commit
    known = {name: value for name, value in stage.items() if value not in (None, "", [])}
    if not known:
        return []  # a model that was made here
    if not here and stage["base_revision"] is None:  # resumed: the checkpoint knows
        earlier = stages_of(Path(source))
        if earlier and earlier[-1].get("base_model") == base:
            return earlier
    if not here:
        folder = snapshot(base, stage["base_revision"])
    return [*stages_of(folder), {**known, **inherited(folder), "hf_moe_version": __version__}]


def snapshot(base: str, revision: str | None) -> Path:
    """A folder with what a model of the Hub says of itself; it stays empty where that cannot be had."""
    folder = Path(
        constants.HF_HUB_CACHE, repo_folder_name(repo_id=base, repo_type="model"), "snapshots", str(revision)
    )
    if revision is not None:
        for name in ("README.md", RECORD):
            with contextlib.suppress(OSError, EntryNotFoundError):
                hf_hub_download(base, name, revision=revision)
    return folder


def write_record(facts: dict[str, Any], model: PreTrainedModel, folder: str | Path) -> None:
    """Write the stages that `model` has been through to `folder`; nothing where nothing is known."""
    found = stages(facts, model)
    if found:
        partial = Path(folder) / f".{RECORD}.partial"
        partial.write_text(json.dumps({"stages": found}, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, Path(folder) / RECORD)
