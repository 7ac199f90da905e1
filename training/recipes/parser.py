"""What reads the arguments of a run: dataclasses, filled from a YAML recipe and from `--key value` after it."""

import argparse
import difflib
import json
import math
import os
import re
from importlib.util import find_spec
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import torch
from huggingface_hub.dataclasses import type_validator
from transformers import TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.trainer_utils import SaveStrategy
from trl import TrlParser

from ..balance.moe_arguments import MUON
from ..host import RENAMED, implementations, missing_reporters, unknown_reporters
from ..host_trl import values_of
from ..output.publishing import STRATEGIES
from ..output.record import describe
from ..trainers.rehearsal import rehearse
from .files import read_recipe

REQUIRED = ("model_name_or_path", "train_data", "output_dir")
# The least and the most of numbers that nothing below refuses: with others a run divides by zero or learns nonsense.
RANGES = {
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "max_length": (2, math.inf),
    "label_smoothing_factor": (0, 1),
    "beta": (0, math.inf),
    "eval_accumulation_steps": (1, math.inf),
    "weight_decay": (0, math.inf),
    "neftune_noise_alpha": (0, 10**4),
    "num_train_epochs": (0, 10**9),
    "lora_alpha": (1, math.inf),
}
INFINITE = [("max_grad_norm", math.inf)]  # the norm is logged, and nothing clipped

# Reporter -> the package that brings it, where it has another name.
PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "dagshub": "dagshub mlflow"}
# What has no meaning without a GPU, and why.
GPU_ONLY = {
    "activation_offloading": "it moves activations from a GPU to the host's memory",
    "use_liger_kernel": "Liger's kernels run on a GPU",
}


class RecipeParser(TrlParser):
    """TRL's parser with a recipe in front of the command line. Every mistake is a ValueError of one line."""

    def __init__(self, dataclass_types):
        super().__init__(dataclass_types, prog="hf-moe train RECIPE", allow_abbrev=False)
        values = {name: known for part in dataclass_types for name, known in values_of(part).items()}
        for action in self._actions:
            action.choices = action.choices or values.get(action.dest)
            if action.dest == "optim":
                action.choices = [*action.choices, MUON]
            if action.dest == "activation_checkpointing":  # true is True, too
                action.type = bool_or_word
        self.known = {action.dest for action in self._actions} - {"help"}
        self.choices = {action.dest: action.choices for action in self._actions if action.choices}
        self.types = {name: kind for part in dataclass_types for name, kind in get_type_hints(part).items()}
        self.without_a_word = {action.dest: action.default for action in reversed(self._actions)}
        self.where = ""  # what is being read, for messages

    def error(self, message: str) -> NoReturn:
        raise ValueError(self.where + re.sub(r"^argument --(\w+)[^:]*", r"argument \1", message))  # without spellings

    def parse(self, argv: list[str]) -> tuple:
        """One instance per dataclass from [recipe, --key, value, ...]; the command line wins."""
        name, *overrides = [with_new_name(word) for word in argv]
        self.take_recipe(name)
        namespace = self.take_overrides(overrides)
        missing = [f"--{key}" for key in REQUIRED if not getattr(namespace, key)]
        if missing:
            raise ValueError(f"Recipe {name} leaves {' and '.join(missing)} to you: give them after the recipe.")
        parsed = self.parse_dict(vars(namespace))
        for part in parsed:
            if isinstance(part, TrainingArguments):
                check_choices(part, part.device)
                check_device(part)
                part.facts = describe(vars(namespace))
                part.said = dict(vars(namespace))
                part.given = self.names_in(overrides)
                named = part.given | self.of_recipe
                part.chosen = frozenset(name for name in named if getattr(namespace, name) is not None)
        return parsed

    def take_overrides(self, words: list[str]) -> argparse.Namespace:
        """What the words of a command line leave of the recipe's values. Raises ValueError for an unknown one."""
        words, unset = without_nulls(words)
        namespace, unknown = self.parse_known_args(words)
        for key in unset:
            self.check_key(key)
            setattr(namespace, key, self.unset(key))
        for word in unknown:
            if word.startswith("--"):
                self.check_key(word[2:].split("=")[0].replace("-", "_"))
        if unknown:
            raise ValueError(f"{unknown[0]!r} belongs to no argument: write --key value.")
        return namespace

    def names_in(self, words: list[str]) -> frozenset[str]:
        """The arguments that words of a command line give."""
        names = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")}
        return frozenset(name if name in self.known else name.removeprefix("no_") for name in names)

    def unset(self, key: str) -> Any:
        """What null means for an argument: none, or where it cannot be that, what it is without a word."""
        return None if type(None) in get_args(self.types[key]) else self.without_a_word[key]

    def parse_dict(self, args: dict, *further, **options) -> tuple:
        check_numbers(args)
        if args.get("dtype") == "float16" and not args.get("lora_parts"):
            raise ValueError(
                "dtype is float16, in which Adam's epsilon and small squares are 0, so that its weights become no "
                "numbers: give float32 (--fp16 true then computes in float16), or lora_parts, which train beside them."
            )
        if args.get("ddp_backend") is not None and "WORLD_SIZE" not in os.environ:
            raise ValueError(
                f"ddp_backend is {args['ddp_backend']}, but this is one process: start several with --accelerate, or "
                "leave it out."
            )
        for name, known in implementations().items():
            value = args.get(name)
            if value is not None and value not in known and "/" not in value:  # a kernel of the Hub
                raise ValueError(f"{name} is {value}; it can be {', '.join(known)}.")
        for name in ("accelerator_config", "fsdp_config"):
            value = args.get(name)
            if isinstance(value, str) and not value.startswith("{") and not os.path.isfile(value):
                raise ValueError(f"{name} is {value}; it must be a mapping or a JSON file with one.")
        multiple = args.get("pad_to_multiple_of")
        if isinstance(multiple, str) and multiple != "auto" and not multiple.isdigit():
            raise ValueError(f"pad_to_multiple_of is {multiple}; it must be a number of tokens, or auto.")
        for name, value in args.items():
            if name.endswith("_kwargs") and isinstance(value, str) and not value.startswith("{"):
                raise ValueError(
                    f"{name} is {value}; it must be a mapping, on the command line '{{\"name\": value}}'."
                )
            if isinstance(value, str) and value.startswith("{") and takes_mapping(self.types.get(name)):
                try:
                    json.loads(value)
                except ValueError as error:
                    raise ValueError(f"{name} is {value}, which is no JSON: {error}.") from error
        return super().parse_dict(args, *further, **options)

    def take_recipe(self, name: str) -> int:
        """Make a recipe's values the defaults, each of its argument's type; returns how many. ValueError where not."""
        recipe = read_recipe(name)
        self.where = f"recipe {name}: "
        for old in recipe.keys() & RENAMED.keys():
            if RENAMED[old] in recipe:
                self.error(f"{old} is the old name of {RENAMED[old]}, which is there, too: leave it out.")
        recipe = {RENAMED.get(key, key): value for key, value in recipe.items()}
        for key in recipe:
            self.check_key(str(key))
        recipe = {key: self.unset(key) if value is None else value for key, value in recipe.items()}
        # Scalars go through argparse, which checks their type and choices. It would take defaults unchecked.
        scalars = {key: value for key, value in recipe.items() if isinstance(value, str | int | float)}
        parsed = vars(self.parse_args([f"--{key}={value}" for key, value in scalars.items()]))
        for key in recipe.keys() - scalars.keys():
            try:
                type_validator(key, recipe[key], self.types[key])
            except TypeError as error:
                self.error(f"argument {key} cannot be {recipe[key]!r}: {' '.join(str(error).split())}")
            for value in recipe[key] or () if key in self.choices else ():
                if value not in self.choices[key]:
                    self.error(f"argument {key} cannot hold {value!r}; it can hold {', '.join(self.choices[key])}.")
        self.set_defaults_with_config(**recipe | {key: parsed[key] for key in scalars})
        self.of_recipe = frozenset(recipe)
        self.where = ""
        return len(recipe)

    def check(self, argv: list[str]) -> int:
        """Validate [recipe, --key, value, ...] without a model or data; returns how many arguments the recipe gives.

        Raises ValueError for the first that is unknown, of another type, in contradiction to the others, or that
        needs a package which is not here. Whether there is a GPU does not count.
        """
        name, *overrides = [with_new_name(word) for word in argv]
        count = self.take_recipe(name)
        given = vars(self.take_overrides(overrides))
        # What only the machine of the run can tell, and what only its user knows, is not the recipe's fault.
        given |= {"use_cpu": True, "bf16": False, "fp16": False, "tf32": None, "deepspeed": None, "fsdp": None}
        given |= {"ddp_backend": None}
        given["output_dir"] = "unused"
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            for part in self.parse_dict(given):
                if isinstance(part, TrainingArguments):
                    check_choices(part, device)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ValueError(f"recipe {name}: {' '.join(str(error).split())}") from error
        return count

    def check_key(self, key: str) -> None:
        if key not in self.known:
            nearest = difflib.get_close_matches(key, self.known, n=1, cutoff=0.0)[0]
            self.error(f"unknown argument {key}; the nearest known one is {nearest}.")


def check_numbers(args: dict[str, Any]) -> None:
    """Raises ValueError for a number that is outside its range, infinite, or none."""
    for name, (least, most) in RANGES.items():
        value = args.get(name)
        if value is not None and not least <= value <= most:
            within = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise ValueError(f"{name} is {value}; it must be {within}.")
    for name, value in args.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, float) and not math.isfinite(number) and (name, number) not in INFINITE:
                raise ValueError(f"{name} is {number}; it must be a finite number.")


def bool_or_word(word: str) -> bool | str:
    try:
        return string_to_bool(word)
    except argparse.ArgumentTypeError:
        return word


def takes_mapping(kind: Any) -> bool:
    return any(dict in (part, get_origin(part)) for part in get_args(kind))


def without_nulls(words: list[str]) -> tuple[list[str], dict[str, None]]:
    """The words of a command line but for `--key null`, and the keys of those that no later word gives a value."""
    options, kept, unset = [], [], {}
    for word in words:
        if word.startswith("--") or not options:
            options.append([])
        options[-1].append(word)
    for option in options:
        name, equals, value = option[0].partition("=")
        key = name.removeprefix("--").replace("-", "_")
        if ([value] if equals else option[1:]) == ["null"]:
            unset[key] = None
        else:
            unset.pop(key, None)
            kept += option
    return kept, unset


def with_new_name(word: str) -> str:
    """A word of the command line with an argument's new name for its old one, which a recipe's new one would beat."""
    name, given, value = word.partition("=")
    name = name.replace("-", "_")
    for old, new in RENAMED.items():
        if name == f"__{old}":
            return f"--{new}{given}{value}"
        if name == f"__no_{old}":
            return f"--{new}=false"
    return word


def check_choices(args: TrainingArguments, device: torch.device | str) -> None:
    """Raises ValueError for a choice that this machine cannot do, or that does nothing without another argument."""
    check_reporters(args.report_to)
    if args.log_routing_figures and find_spec("matplotlib") is None:
        raise ValueError("log_routing_figures is true, which needs matplotlib: pip install 'hf_moe[plots]'.")
    if args.push_to_hub and args.hub_strategy not in STRATEGIES:
        raise ValueError(
            f"hub_strategy is {args.hub_strategy.value}, which would upload pickles; it can be "
            f"{' or '.join(strategy.value for strategy in STRATEGIES)}."
        )
    if args.dataloader_multiprocessing_context is not None and not args.dataloader_num_workers:
        raise ValueError(
            f"dataloader_multiprocessing_context is {args.dataloader_multiprocessing_context}, but rows are loaded in "
            "one process: give --dataloader_num_workers, or leave it out."
        )
    if args.save_strategy == SaveStrategy.BEST and args.metric_for_best_model is None:
        raise ValueError("save_strategy is best: give --metric_for_best_model, as eval_loss, or save by steps.")
    rehearse(args, device)


def check_device(args: TrainingArguments) -> None:
    """Raises ValueError for what needs a GPU where there is none."""
    for name, why in GPU_ONLY.items():
        if getattr(args, name, False) and args.device.type == "cpu":
            raise ValueError(f"{name} is true, but {why}: set it to false on a CPU.")


def check_reporters(names: list[str]) -> None:
    """Raises ValueError for what Transformers does not report to, or would, were its package there."""
    if unknown := unknown_reporters(names):
        raise ValueError(
            f"report_to is {unknown[0]}, which Transformers does not know: say trackio, tensorboard or wandb, or none "
            "(metrics.jsonl is written in any case)."
        )
    if missing := missing_reporters(names):
        package = PACKAGES.get(missing[0], missing[0])
        raise ValueError(
            f"report_to is {missing[0]}, whose package is not installed: pip install {package}, or say none "
            "(metrics.jsonl is written in any case)."
        )
