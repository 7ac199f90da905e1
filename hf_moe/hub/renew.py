"""A saved folder's model code: how old it is, and today's in its place."""

import ast
import os
import secrets
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_imports

from ..model.configuration_hf_moe import HfMoeConfig
from ..model.router_code import importing
from ..version import __version__
from .folder import CODE, CONFIG, read_json

VERSION_FILE = "version.py"
FIRST = "0.1.0"  # whose code has no such file


def with_imports(folder: Path, modules: list[str]) -> list[str]:
    """The files of `modules` in `folder` and of all that they import there; what is not there is left out."""
    found, waiting = [], [f"{name}.py" for name in modules]
    while waiting:
        name = waiting.pop()
        if name not in found and (folder / name).is_file():
            found.append(name)
            waiting += [f"{each}.py" for each in get_relative_imports(folder / name)]
    return found


def todays_code(model_type: str = HfMoeConfig.model_type, router_code: str | None = None) -> dict[str, bytes]:
    """The files that go along with every saved model of this type: name and contents.

    router_code: the file of a router of its own, which stays as it is.
    """
    folder, module = Path(CODE[model_type].__file__).parent, CODE[model_type].__name__.rpartition(".")[2]
    code = {name: (folder / name).read_bytes() for name in with_imports(folder, [module])}
    if router_code is not None:
        code["routing.py"] += importing(router_code).encode()
    return code


def code_in(folder: Path, config: dict) -> list[str]:
    """The files beside the weights that the config's auto_map needs."""
    references = [x for x in config["auto_map"].values() if isinstance(x, str) and "--" not in x]
    return with_imports(folder, sorted({reference.split(".")[0] for reference in references}))


def code_version(folder: Path) -> str:
    """The release of hf_moe that the code in `folder` is of. Nothing of it is run."""
    path = folder / VERSION_FILE
    if not path.is_file():
        return FIRST
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__version__":
            return str(ast.literal_eval(node.value))
    return FIRST


def release(version: str) -> tuple[int, ...]:
    return tuple(int(x) for x in version.split(".")[:3] if x.isdigit())


def is_outdated(folder: Path) -> bool:
    """Whether the code in `folder` is of an earlier release than the hf_moe that runs."""
    return release(code_version(folder)) < release(__version__)


def renew(folder: str | Path) -> dict[str, object]:
    """Give the hf_moe model in `folder` today's code; weights, config and all else stay as they are.

    Each file is written aside and takes its name when it is whole, so that after an interruption the same call goes
    on. Returns the folder, its code's release before and after, and the files written and removed. Raises
    FileNotFoundError or ValueError where there is no such model.
    """
    folder = Path(folder)
    said = read_json(folder / CONFIG)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder / CONFIG} does not exist: give the folder of a saved hf_moe model.")
    if said.get("model_type") not in CODE:
        raise ValueError(
            f"{folder} holds a model of type {said.get('model_type')!r}, whose code is not hf_moe's: there is nothing "
            "to renew."
        )
    if "auto_map" not in said:
        raise ValueError(
            f"{folder / CONFIG} has no auto_map, so no code belongs to it: load the model with hf_moe and save it."
        )
    before, kept = code_version(folder), said.get("router_code")
    code, old = todays_code(said["model_type"], kept), code_in(folder, said)
    written = [name for name, text in code.items() if not same(folder / name, text)]
    for name in sorted(written, key=lambda name: name == VERSION_FILE):  # the release is said when all of it is there
        aside = folder / f".{name}.{secrets.token_hex(4)}"
        aside.write_bytes(code[name])
        os.replace(aside, folder / name)
    removed = sorted(set(old) - set(code) - {kept})
    for name in removed:
        (folder / name).unlink()
    return {
        "folder": str(folder),
        "before": before,
        "now": __version__,
        "written": sorted(written),
        "removed": removed,
    }


def same(path: Path, text: bytes) -> bool:
    return path.is_file() and path.read_bytes() == text
