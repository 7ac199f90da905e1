"""What Transformers makes of a user's files: a config, a tokenizer, a model, or one line that says why not.

It computes with what a file says before it checks it, so that a wrong value is a TypeError, an IndexError or a
RuntimeError as often as a ValueError, and the tokenizers library raises bare exceptions.
"""

import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from .model.configuration_hf_moe_graft import HfMoeGraftConfig, has_parts
from .model.router_code import HfMoeRouterCode

# Beside the weights of a model that reads pictures.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
# What a tokenizer is tried on: a word, and a sign that it reads by its bytes, or as unknown.
PROBE = "word \N{CUNEIFORM SIGN A}"
# In the report that Transformers logs of a load: a weight, and the last line of the traceback.
UNCONVERTED = re.compile(r"^(\S+) *\| CONVERSION \|.*?^\w*Error: ([^\n]*)$", re.MULTILINE | re.DOTALL)


def built(make: Callable, what: str, *arguments: Any, **fields: Any) -> Any:
    """What `make` returns. Its complaints about fields become a ValueError of one line that says `what` is wrong.

    A file that is not there is an OSError, and a package an ImportError, as Transformers says it.
    """
    try:
        return make(*arguments, **fields)
    except (OSError, ImportError):
        raise
    except BaseException as error:  # the tokenizers library panics, too, which is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    said = str(error.__cause__ or error)
    if isinstance(error, KeyError):  # a key, or what Transformers says of several
        said = str(error.args[0]) if " " in str(error.args[0]) else f"{error} is missing or unknown"
    return " ".join(said.split()) or type(error).__name__


def auto_config(model: str | Path, **kwargs: Any) -> PreTrainedConfig:
    """`AutoConfig.from_pretrained`. Raises OSError or a ValueError of one line."""
    where = str(Path(model) / "config.json" if Path(model).is_dir() else f"the config of {model}")
    config = built(AutoConfig.from_pretrained, where, model, **kwargs)
    if kwargs.get("trust_remote_code"):
        if isinstance(config, HfMoeGraftConfig):
            built(config.run_code, where, model)
        if isinstance(config, HfMoeRouterCode):
            built(config.run_router_code, where, model)
    text = built(config.get_text_config, where)  # of any field with one of some names
    if not isinstance(text, PreTrainedConfig):
        name = next(name for name, value in vars(config).items() if value is text)
        raise ValueError(f"{where} says {name}={text!r:.100}, which is no config.")
    return config


def auto_tokenizer(model: str | Path, what: str, **kwargs: Any) -> PreTrainedTokenizerBase:
    """`AutoTokenizer.from_pretrained`, tried on a text: what a file says wrongly may show in use alone.

    Raises a ValueError of one line that begins with `what`.
    """
    try:
        tokenizer = built(AutoTokenizer.from_pretrained, what, model, **kwargs)
        built(tokenizer, what, PROBE, truncation=True)
        return tokenizer
    except OSError as error:
        raise ValueError(f"{what}: {reason(error)}") from error


def auto_class(config: PreTrainedConfig) -> type:
    """The Auto class that loads all of the model: one that reads pictures is more than the decoder in it."""
    reads_pictures = has_parts(config) and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if reads_pictures else AutoModelForCausalLM


def positions(config: PreTrainedConfig, most: int) -> int:
    """How many tokens a model reads together, at most `most`; some say no limit of their own (BLOOM).

    Raises ValueError where it is none that a text can be read by.
    """
    said = getattr(config, "max_position_embeddings", None) or most
    if said < 2:
        raise ValueError(f"config.json says max_position_embeddings={said}, but a text takes at least 2: correct it.")
    return min(most, said)


@contextmanager
def conversion_errors(found: list[str]) -> Iterator[None]:
    """Adds to `found` the weights that Transformers could not make of those in the files, each with the reason.

    It would log their tracebacks.
    """

    def wanted(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        found.extend(f"{name}: {why}" for name, why in UNCONVERTED.findall(said))
        return not UNCONVERTED.search(said)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(wanted)
    try:
        yield
    finally:
        logger.removeFilter(wanted)


def whole_model(
    path: str | Path, auto_class=AutoModelForCausalLM, drawn: str | None = None, **kwargs: Any
) -> PreTrainedModel:
    """`auto_class.from_pretrained(path)`; ValueError where weights are missing, unreadable, of another size or NaN.

    drawn: a regular expression; what is missing and has such a name is drawn, and its names are said.
    """
    if auto_class is AutoModelForCausalLM and (Path(path) / "config.json").is_file():
        check_files_hold(Path(path), kwargs.get("config"), kwargs.get("trust_remote_code", False))
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    unconverted: list[str] = []
    try:
        with conversion_errors(unconverted):
            model, info = built(auto_class.from_pretrained, f"{path} cannot be loaded", path, **kwargs)
    except ValueError as error:
        if isinstance(error.__cause__, SafetensorError):
            raise ValueError(f"{path} has weights that cannot be read: {error.__cause__}") from error
        if unconverted:
            raise ValueError(f"{path} cannot be loaded: its weights do not make {unconverted[0]}") from error
        raise
    weights = dict(model.named_parameters(remove_duplicate=False))
    found = {id(weight) for name, weight in weights.items() if name not in info["missing_keys"]}
    missing = sorted(name for name in info["missing_keys"] if id(weights.get(name)) not in found)  # less what is tied
    new = [name for name in missing if drawn and re.search(drawn, name)]
    if new:
        print(f"drawn, as {path} has none: {new[0]}{f' and {len(new) - 1} more' * (len(new) > 1)}", file=sys.stderr)
        missing = sorted(set(missing) - set(new))
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of the model's weights, the first of them {missing[0]}.")
    wrong = sorted(info["mismatched_keys"])
    if wrong:
        name, found, expected = wrong[0]
        raise ValueError(
            f"{path} has {len(wrong)} of the model's weights in another size, the first of them {name}: "
            f"{list(found)} for {list(expected)}."
        )
    for name, weight in model.named_parameters():
        if not is_finite(weight.detach()):
            raise ValueError(f"{path} has weights that are no finite numbers, the first of them {name}.")
    return model


def is_finite(weight: torch.Tensor) -> bool:
    """Whether all of it are numbers, as far as it is here and has a type with others."""
    weight = weight.to_local() if hasattr(weight, "to_local") else weight  # of shards a process's own, if it has one
    if is_traceable_wrapper_subclass(weight):  # of codes the scales say it
        return all(is_finite(getattr(weight, name)) for name in weight.__tensor_flatten__()[0])
    if weight.is_meta or not weight.numel() or not weight.is_floating_point() or weight.itemsize == 1:
        return True
    return all(x.isfinite() for x in weight.aminmax())


def check_files_hold(folder: Path, config: PreTrainedConfig | None, trust_remote_code: bool) -> None:
    """Raises ValueError where the weights in `folder` are too few for the model of its config, in one bit each.

    Transformers would draw the others at random, in as much memory as a mistaken size calls for.
    """
    config = auto_config(folder, trust_remote_code=trust_remote_code) if config is None else config
    files = sorted(folder.glob("*.safetensors"))
    layers, tensors = getattr(config.get_text_config(), "num_hidden_layers", 0), 0
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                tensors += len(weights.keys())
        except SafetensorError as error:
            raise ValueError(f"{folder} has weights that cannot be read: {error}") from error
    if files and layers > tensors:
        raise ValueError(f"{folder / 'config.json'} says num_hidden_layers={layers}, but {tensors} weights are there.")
    with torch.device("meta"):
        what = f"{folder} cannot be loaded"
        model = built(AutoModelForCausalLM.from_config, what, deepcopy(config), trust_remote_code=trust_remote_code)
    parameters, stored = sum(x.numel() for x in model.parameters()), sum(file.stat().st_size for file in files)
    if files and parameters > 8 * stored:
        raise ValueError(
            f"{folder / 'config.json'} describes a model of {parameters:,} parameters, but the weights beside it are "
            f"{stored:,} bytes."
        )
