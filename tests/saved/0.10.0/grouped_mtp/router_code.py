"""A router of the user's own: its file goes along with a saved model, and runs by the user's consent alone."""

import ast
import os
import re
import sys
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from transformers.utils import cached_file, logging

from .routing import ROUTERS

logger = logging.get_logger(__name__)

PACKAGE = __name__.rpartition(".")[0]  # hf_moe.model, or what Transformers makes of a saved model's folder
SAVED = re.compile(r"plugin_\w+\.py")
# Of hf_moe what stands beside a saved model is this folder's files alone.
BESIDE = re.compile(r"^(\s*)from hf_moe\.model(\.\w+)? import", re.MULTILINE)


def file_of(router_type: str) -> Path | None:
    """The file that a router was registered from, None where it is one of those that any saved model has beside it.

    Raises ValueError where what its line in `ROUTERS` names is in several files.
    """
    router = ROUTERS[router_type]
    parts = (router.affinity, router.assign, router.module)
    names = {(part.func if isinstance(part, partial) else part).__module__ for part in parts}
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in names}
    own = {name: file for name, file in files.items() if file is None or Path(file).parent != Path(__file__).parent}
    if len(own) > 1:
        raise ValueError(f"router_type {router_type!r} is in {sorted(own)}: put all of it into one file.")
    for name, file in own.items():
        if file is None or name == "__main__":
            logger.warning_once(
                f"router_type {router_type!r} is defined in a session or a script, whose code does not go along with "
                "a saved model: to load it elsewhere, put the router into a file of its own and import that."
            )
            return None
        return Path(file)
    return None


def saved_name(router_type: str) -> str | None:
    """The name of the router's file beside a saved model."""
    file = file_of(router_type)
    return file and (file.name if SAVED.fullmatch(file.name) else f"plugin_{file.stem}.py")


def saved_text(file: Path) -> str:
    """What stands in the router's file beside a saved model, where hf_moe's own files are its neighbours.

    Raises ValueError where it needs others of hf_moe's.
    """
    text = BESIDE.sub(lambda found: f"{found[1]}from {found[2] or '.'} import", file.read_text(encoding="utf-8"))
    for node in ast.walk(ast.parse(text)):
        names = [x.name for x in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
        for name in names if isinstance(node, (ast.Import, ast.ImportFrom)) else ():
            if name and name.split(".")[0] == "hf_moe" and not getattr(node, "level", 0):
                raise ValueError(
                    f"{file} imports {name} in line {node.lineno}, but what goes along with a saved model has nothing "
                    "of hf_moe's beside it but hf_moe.model: write `from hf_moe.model.routing import ...`, and leave "
                    "what else a plugin does to another file."
                )
    return text


def importing(name: str) -> str:
    """The line of a saved model's routing.py that registers its router."""
    return f"\nfrom .{name.removesuffix('.py')} import *  # noqa: E402, F403  registers the router of this model\n"


def save_router_code(router_type: str, folder: str | os.PathLike) -> None:
    """Write the router's file beside the code in `folder`, whose routing.py imports it from then on."""
    file, name = file_of(router_type), saved_name(router_type)
    routing = Path(folder) / "routing.py"
    if file is not None and routing.is_file():
        written = {Path(folder) / name: saved_text(file), routing: routing.read_text(encoding="utf-8")}
        if importing(name) not in written[routing]:
            written[routing] += importing(name)
        for path, text in written.items():
            aside = path.with_name(f".{path.name}.partial")
            aside.write_text(text, encoding="utf-8")
            os.replace(aside, path)


class HfMoeRouterCode:
    """What a config does for a router that comes with its model. `router_code` is the name of its file."""

    @property
    def needs_router_code(self) -> bool:
        """Whether the router is in a file that comes with the model and was not run."""
        return self.router_type not in ROUTERS and self.router_code is not None

    @property
    def fills_slots(self) -> bool:
        """Whether every token has all of its experts."""
        return self.needs_router_code or ROUTERS[self.router_type].fills

    def run_router_code(self, folder: str | os.PathLike, **where: Any) -> None:
        """Register the router that comes with the model in `folder`, or on the Hub, by running its file.

        Raises ValueError where the file is not there, or the router is known by other code.
        """
        if self.router_code is None:
            return
        path = Path(cached_file(str(folder), self.router_code, **where))
        if self.router_type in ROUTERS:
            known = file_of(self.router_type)
            if known is not None and saved_text(known) != saved_text(path):
                raise ValueError(
                    f"router_type {self.router_type!r} is known here from {known}, and {path} is other code: load one "
                    "of them in a process of its own."
                )
            return
        name = f"{PACKAGE}.{path.stem}"
        spec = spec_from_file_location(name, path)
        module = sys.modules[name] = module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        self.validate()

    def name_router_code(self) -> None:
        """Name the file that is to be saved; one that was not run is not there to be."""
        if not self.needs_router_code:
            self.router_code = saved_name(self.router_type)

    def save_router_code(self, folder: str | os.PathLike) -> None:
        if not self.needs_router_code:
            save_router_code(self.router_type, folder)
