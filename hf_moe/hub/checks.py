"""What is looked at before anything is uploaded: which files go, and whether what arrives will load."""

import os
import re
import zipfile
from copy import deepcopy
from pathlib import Path

import torch
from transformers.dynamic_module_utils import get_relative_imports

from ..version import __version__
from .folder import ADAPTER, CODE, CONFIG, METRICS, SavedModel, read_folder, read_json
from .redaction import TOKENS, known_tokens
from .renew import code_version, is_outdated

# What a Trainer leaves for going on, pickles most of it, and nobody loads a model from.
TRAINER_FILES = re.compile(
    r"(training_args\.bin|run\.json|optimizer\.(pt|bin)|scheduler\.pt|scaler\.pt|rng_state.*\.pth)"
)
PICKLES = (".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth")
CHECKPOINT = re.compile(r"checkpoint-\d+")
UNREAD = (".safetensors", ".png")  # no text
BLOCK, LONGEST = 1 << 20, 512  # bytes read at a time, and the length up to which a secret is found across two


def check_folder(folder: Path, checkpoints: bool = False) -> tuple[list[str], dict[str, str]]:
    """The files to upload, relative to `folder`, and name -> why of what is left out.

    Raises FileNotFoundError or a ValueError that names the file: no model, one that would not load, a pickle, a link
    out of the folder, or something that looks like a token.
    """
    saved = read_folder(folder)
    check_loads(saved)
    files, left_out = choose_files(folder, checkpoints)
    for file in files:
        check_file(folder, file)
    return files, left_out


def choose_files(folder: Path, checkpoints: bool) -> tuple[list[str], dict[str, str]]:
    """Files to upload and what is left out; a folder is left out whole."""
    files, left_out = [], {}
    for parent, folders, names in os.walk(folder):
        inside = Path(parent).relative_to(folder)
        for name in sorted(folders):
            path = inside / name
            if why := folder_left_out(folder / path, checkpoints):
                left_out[f"{path}/"] = why
                folders.remove(name)
        folders.sort()
        for name in sorted(names):
            path = (inside / name).as_posix()
            if name.startswith(".") and name != ".gitattributes":
                left_out[path] = "hidden"
            elif TRAINER_FILES.fullmatch(name):
                left_out[path] = "for resuming"
            elif name == METRICS:
                left_out[path] = "logs"
            else:
                files.append(path)
    return files, left_out


def folder_left_out(path: Path, checkpoints: bool) -> str | None:
    """Why a folder is not uploaded, None where it is."""
    if path.name.startswith(".") or path.name == "__pycache__":
        return "hidden"
    if CHECKPOINT.fullmatch(path.name):
        return None if checkpoints else "a checkpoint"
    if path.name == "runs":
        return "logs"
    if any((path / name).is_file() for name in (CONFIG, ADAPTER)) or any(path.glob("*.safetensors")):
        return "another model"
    return None


def check_file(folder: Path, name: str) -> None:
    """Raises a ValueError for a link out of the folder, a pickle, or what looks like a token."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path} is a link to {path.resolve()}, outside the folder; put the file itself there.")
    if path.suffix in UNREAD:
        return
    if path.suffix in PICKLES or is_pickle(path):
        raise ValueError(f"{path} is a pickle, which runs code when it is loaded; move it out of the folder.")
    secrets = [re.escape(token) for token in known_tokens()]
    pattern = re.compile("|".join([*secrets, TOKENS.pattern]).encode())
    with path.open("rb") as file:
        tail, number = b"", 1
        while block := file.read(BLOCK):
            text = tail + block
            if found := pattern.search(text):
                line = number + text.count(b"\n", 0, found.start())
                raise ValueError(f"{path} holds what looks like a secret, in line {line}; take it out and revoke it.")
            number += text[:-LONGEST].count(b"\n")
            tail = text[-LONGEST:]


def is_pickle(path: Path) -> bool:
    """By its first bytes: pickle's protocols 2 to 5, or PyTorch's archive of one."""
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"PK\x03\x04" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    return len(start) > 1 and start[0] == 0x80 and 2 <= start[1] <= 5


def check_loads(saved: SavedModel) -> None:
    """Raises FileNotFoundError or a ValueError for code, weights or a base model that others would miss."""
    check_base(saved.adapter.get("base_model_name_or_path"))
    if saved.is_hf_moe and is_outdated(saved.folder):
        raise ValueError(
            f"{saved.folder} holds model code of hf_moe {code_version(saved.folder)}, older than this {__version__}, "
            f"with which newer releases of Transformers may write other texts: hf-moe renew {saved.folder}."
        )
    for file in (CONFIG, "tokenizer_config.json"):
        check_code(saved.folder, file)
    if saved.is_hf_moe:
        if "auto_map" not in read_json(saved.folder / CONFIG):
            raise ValueError(
                f"{saved.folder / CONFIG} has no auto_map, so nobody without hf_moe can load the model; load it and "
                "save it again with save_pretrained."
            )
        needs_code = getattr(saved.config, "needs_code", False)
        if needs_code:
            check_code(saved.folder, CONFIG, saved.config.backbone.to_dict())
        if not (needs_code or saved.config.needs_router_code):  # which is not run here
            check_weights(saved)


def check_base(name: str | None) -> None:
    """Raises a ValueError where an adapter's base model is a folder, which others do not have."""
    if name and (name.startswith((".", "/", "~")) or Path(name).exists()):
        raise ValueError(
            f"The adapter's base model is {name}, a folder of this machine: put the Hub id of that model into "
            f"{ADAPTER}, base_model_name_or_path, or train from that id."
        )


def check_code(folder: Path, file: str, said: dict | None = None) -> None:
    """Raises FileNotFoundError where a module that `file` names, or what is `said` in it, or that it imports, is not
    there."""
    references = [
        reference
        for value in (read_json(folder / file) if said is None else said).get("auto_map", {}).values()
        for reference in ([value] if isinstance(value, str) else value)
        if reference is not None and "--" not in reference  # whose code is in another repository
    ]
    needed = list(dict.fromkeys(reference.split(".")[0] for reference in references))
    for module in needed:  # which grows meanwhile
        path = folder / f"{module}.py"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist, but auto_map in {file} needs it.")
        needed += [name for name in get_relative_imports(path) if name not in needed]


def check_weights(saved: SavedModel) -> None:
    """Raises a ValueError that names a tensor which the config calls for and the files lack or have in another size.

    Only headers are read; the model is built without memory.
    """
    architecture = (saved.config.architectures or ["HfMoeForCausalLM"])[0]
    with torch.device("meta"):
        model = getattr(CODE[saved.config.model_type], architecture)(deepcopy(saved.config))
    for name, tensor in model.state_dict().items():
        if name in model.all_tied_weights_keys:
            continue
        found, shape = saved.shapes.get(name), tuple(tensor.shape)
        if found != shape:
            what = "is missing from the weights" if found is None else f"has shape {list(found)}"
            raise ValueError(f"{saved.folder}: {name} {what}, but the config calls for {list(shape)}.")
