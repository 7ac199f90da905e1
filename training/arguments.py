"""Every argument of a run: dataclasses, filled from a YAML recipe and from `--key value` after it."""

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from .parameter_groups import GROUPS
from .sft_trainer import MoeSFTConfig

RECIPES = Path(__file__).parent / "recipes"
REQUIRED = ("model_name_or_path", "train_data", "output_dir")


@dataclass
class ModelArguments:
    """Which model, and how to load it (`trust_remote_code` is the trainer's own argument)."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder of a checkpoint, or its Hub id."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a Hub checkpoint."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Type of the weights; `bf16` then computes in bfloat16 over float32 weights.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    trainable: str = field(
        default="all",
        metadata={
            "help": "Which parameters train; the others get no gradient and no optimizer state. Where the router is "
            "frozen, its selection bias stands still, too.",
            "choices": list(GROUPS),
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "sdpa, eager, flash_attention_2, flex_attention; default: the model's own."}
    )
    experts_implementation: str | None = field(
        default=None, metadata={"help": "grouped_mm, batched_mm, eager; default: the model's own."}
    )


@dataclass
class DataArguments:
    """Where the rows are. Columns: messages, conversations, prompt and completion, or dataset_text_field."""

    train_data: list[str] | None = field(
        default=None, metadata={"help": "Files (.jsonl, .json, .parquet), or one folder or Hub data set."}
    )
    eval_data: list[str] | None = field(default=None, metadata={"help": "The same for the held-out rows."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_split: str = field(default="train", metadata={"help": "Split of a folder or a Hub data set."})
    eval_split: str = field(default="validation", metadata={"help": "Split of a folder or a Hub data set."})


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with hf_moe: "<model>/<stage>" to file."""
    return {path.relative_to(RECIPES).with_suffix("").as_posix(): path for path in sorted(RECIPES.glob("*/*.yaml"))}


def read_recipe(name: str) -> dict[str, Any]:
    """Arguments in the YAML file `name`, or in the shipped recipe of that name.

    Raises FileNotFoundError if there is neither, ValueError if the file does not hold a mapping.
    """
    path = Path(name) if Path(name).is_file() else shipped_recipes().get(name)
    if path is None:
        raise FileNotFoundError(f"No recipe {name}: give a YAML file, or one of {', '.join(shipped_recipes())}.")
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"Recipe {name} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"Recipe {name} must map argument names to values, but holds a {type(recipe).__name__}.")
    return recipe


class RecipeParser(TrlParser):
    """TRL's parser with a recipe in front of the command line. Every mistake is a ValueError of one line."""

    def __init__(self, dataclass_types):
        super().__init__(dataclass_types, prog="hf-moe train RECIPE", allow_abbrev=False)
        self.known = {action.dest for action in self._actions} - {"help"}

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def parse(self, argv: list[str]) -> tuple:
        """One instance per dataclass from [recipe, --key, value, ...]; the command line wins."""
        if not argv:
            raise ValueError(f"Give a recipe: a YAML file, or one of {', '.join(shipped_recipes())}.")
        if argv[0] in ("-h", "--help"):
            self.parse_args(argv)
        name, *overrides = argv
        recipe = read_recipe(name)
        for key in recipe:
            self.check_key(str(key), f"recipe {name}: ")
        # Scalars go through argparse, which checks their type and choices. It would take defaults unchecked.
        scalars = {key: value for key, value in recipe.items() if isinstance(value, str | int | float)}
        self.set_defaults_with_config(**{key: value for key, value in recipe.items() if key not in scalars})
        namespace, unknown = self.parse_known_args([f"--{k}={v}" for k, v in scalars.items()] + overrides)
        for word in unknown:
            if word.startswith("--"):
                self.check_key(word[2:].split("=")[0].replace("-", "_"))
        if unknown:
            raise ValueError(f"{unknown[0]!r} belongs to no argument: write --key value.")
        missing = [f"--{key}" for key in REQUIRED if not getattr(namespace, key)]
        if missing:
            raise ValueError(f"Recipe {name} leaves {' and '.join(missing)} to you: give them after the recipe.")
        return self.parse_dict(vars(namespace))

    def check_key(self, key: str, where: str = "") -> None:
        if key not in self.known:
            nearest = difflib.get_close_matches(key, self.known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where}unknown argument {key}; the nearest known one is {nearest}.")


def parse_sft(argv: list[str]) -> tuple[ModelArguments, DataArguments, MoeSFTConfig]:
    """The arguments of a supervised fine-tuning run from [recipe, --key, value, ...]."""
    return RecipeParser((ModelArguments, DataArguments, MoeSFTConfig)).parse(argv)
