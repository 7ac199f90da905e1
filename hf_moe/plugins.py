"""Files of the user's own, run before a command or a recipe: what they register, everything here then knows."""

import sys
import traceback
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

PREFIX = "hf_moe_plugin_"  # of their modules


def load_plugin(path: str | Path) -> ModuleType:
    """Run the Python file `path`, once, as the module hf_moe_plugin_NAME; only what the user names is to be given.

    It registers by the dicts that hf_moe has itself, such as `hf_moe.model.routing.ROUTERS`. Raises FileNotFoundError
    where there is no such file, ValueError if it fails, or another plugin has its name.
    """
    file = Path(path).resolve()
    if not file.is_file() or file.suffix != ".py":
        raise FileNotFoundError(f"No plugin {path}: give a Python file.")
    name = f"{PREFIX}{file.stem}"
    known = sys.modules.get(name)
    if known is not None:
        if known.__file__ != str(file):
            raise ValueError(f"Plugin {path} has the name of {known.__file__}, which is loaded: rename one of them.")
        return known
    spec = spec_from_file_location(name, file)
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        inside = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
        line = inside[-1] if inside else getattr(error, "lineno", "?")
        raise ValueError(f"Plugin {path} fails in line {line}: {type(error).__name__}: {error}") from error
    return module


def loaded_plugins() -> tuple[str, ...]:
    """The files of those that are loaded here."""
    return tuple(x.__file__ for name, x in sys.modules.items() if name.startswith(PREFIX) and x.__file__)
