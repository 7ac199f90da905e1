"""A run from its recipe: which stage, with which arguments. A stage's module is imported only when it is used."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hf_moe.plugins import load_plugin

from .recipes.files import read_recipe
from .stages.names import STAGES

if TYPE_CHECKING:
    from .stages.run import Trained


def stage_module(argv: list[str]) -> ModuleType:
    """The module of the stage that [recipe, --key, value, ...] runs: `--stage` wins over the recipe's `stage`.

    The plugins that it names are run before, as what they register may be named by other arguments. Raises
    FileNotFoundError where there is no such recipe or plugin, ValueError where there is no such stage.
    """
    if not argv:
        raise ValueError("Give a recipe: a YAML file, or a name that hf-moe train --list shows.")
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--stage", nargs="?")
    early.add_argument("--plugins", nargs="*")
    said = early.parse_known_args(argv)[0]
    recipe = {} if argv[0].startswith("-") else read_recipe(argv[0])
    stage = recipe.get("stage") if said.stage is None else said.stage
    plugins = recipe.get("plugins") if said.plugins is None else said.plugins
    for plugin in [plugins] if isinstance(plugins, str) else plugins or []:
        if plugin != "null":
            load_plugin(plugin)
    stage = "sft" if stage in (None, "null") else stage
    if stage not in list(STAGES):  # which compares values of any type
        raise ValueError(f"recipe {argv[0]}: stage is {stage!r}; it can be {', '.join(STAGES)}.")
    return import_module(STAGES[stage])


def parser_of(stage: ModuleType):
    """What reads the arguments of a stage."""
    from .recipes.parser import RecipeParser  # TRL, which takes seconds to import

    return RecipeParser(stage.ARGUMENTS)


def parse(argv: list[str]) -> tuple:
    """The arguments of the run that [recipe, --key, value, ...] describes: one instance of each dataclass."""
    return parser_of(stage_module(argv)).parse(argv)


def train(recipe: str | Path, model: str | Path | None = None, **overrides: Any) -> "Trained":
    """Run a recipe: the trainer, with the trained model, and the metrics.

    As `hf-moe train`: `recipe` is a YAML file or the name of one that comes along, `model` its model_name_or_path, a
    folder or a Hub id, and each other keyword replaces the recipe's value of that key. Raises ValueError or OSError
    for mistakes, as an argument that nobody knows, before anything is trained.
    """
    if model is not None:
        if not isinstance(model, (str, Path)):
            raise ValueError(
                f"model is a {type(model).__name__}, and a recipe trains what is in a folder or on the Hub: give its "
                "place, or train this one with MoeTrainer or MoeSFTTrainer."
            )
        if "model_name_or_path" in overrides:
            raise ValueError("model and model_name_or_path say the same: give one of them.")
        overrides = {"model_name_or_path": model, **overrides}
    return run([str(recipe), *(word for name, value in overrides.items() for word in words(name, value))])


def words(name: str, value: Any) -> list[str]:
    """An argument as the command line has it."""
    values = [json.dumps(value)] if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
    spelled = {None: "null", True: "true", False: "false"}
    return [f"--{name}", *(spelled[x] if x is None or isinstance(x, bool) else str(x) for x in values)]


def main(argv: list[str]) -> dict[str, float]:
    """Run the recipe argv[0] with the arguments after it; returns the metrics. Raises as `run`."""
    return run(argv).metrics


def run(argv: list[str]) -> "Trained":
    """Run the recipe argv[0] with the arguments after it.

    Raises ValueError or OSError for the user's mistakes, such as an optimizer whose package is not there.
    """
    try:
        stage = stage_module(argv)
        from transformers import TrainingArguments

        from .host_trl import quiet

        with quiet():
            parsed = parser_of(stage).parse(argv)
            (output,) = (Path(part.output_dir) for part in parsed if isinstance(part, TrainingArguments))
            with nothing_left(output):
                return stage.run(*parsed)
    except PackageNotFoundError as error:  # said by Transformers of DeepSpeed and the like
        raise ValueError(" ".join(str(error.name).split())) from error
    except ImportError as error:
        if error.name is not None:  # Python's own, of a module: not what a library says of its extras
            raise
        raise ValueError(" ".join(str(error).split())) from error


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    """Takes away the folder of a run that ends in an error before anything is in it."""
    new = not folder.exists()
    try:
        yield
    except BaseException:
        if new and folder.is_dir() and not any(folder.iterdir()):
            with suppress(FileNotFoundError):  # another process was first
                folder.rmdir()
        raise


def check_recipe(name: str, *overrides: str) -> int:
    """Validate every argument of a recipe, and of what follows it, without training; returns how many it gives.

    Raises as RecipeParser.
    """
    return parser_of(stage_module([name, *overrides])).check([name, *overrides])


def arguments_of(name: str) -> dict[str, Any]:
    """Every argument of a recipe, those that it leaves out with their defaults. Raises as `check_recipe`."""
    from .host import by_both_names

    parser = parser_of(stage_module([name]))
    parser.check([name])
    parser.take_recipe(name)
    return by_both_names(vars(parser.parse_args([])))
