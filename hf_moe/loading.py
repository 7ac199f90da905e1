"""A causal language model and its tokenizer from a folder or the Hub; in a folder, also an adapter of one."""

import json
import re
import sys
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .generation_settings import FILE as GENERATION_CONFIG
from .generation_settings import mend_ids, mended_config, say_ids
from .reading import auto_config, auto_tokenizer, whole_model
from .stored_loading import quantized_as


def load(
    model: str | Path, trust_remote_code: bool = False, quantize: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, as `load_model` has it, and its tokenizer.

    Raises FileNotFoundError, OSError or ValueError where either cannot be had.
    """
    check_model(model, trust_remote_code)
    source = model if base_of(model) is None or (Path(model) / "tokenizer_config.json").is_file() else base_of(model)
    what = f"{model} has no tokenizer that can be loaded"
    tokenizer = auto_tokenizer(source, what, trust_remote_code=trust_remote_code)
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):  # made from the config, without files
        raise ValueError(f"{model} has no tokenizer; save one beside the model.")
    return load_model(model, trust_remote_code, quantize), tokenizer


def load_model(model: str | Path, trust_remote_code: bool = False, quantize: str | None = None) -> PreTrainedModel:
    """The model, which `check_model` has let through, in its saved precision and on the GPU if there is one.

    `quantize`: its matrices in fewer bits, as StoredWeightsConfig has them.

    An adapter comes on its base, with the selection biases that were trained beside it.
    """
    config, left_out = mended_config(base_of(model) or model, trust_remote_code=trust_remote_code)
    if left_out:
        print(left_out, file=sys.stderr)
    right = {} if config is None else {"config": config}
    if quantize is not None:
        of = base_of(model) or model
        right |= quantized_as(quantize, config or auto_config(of, trust_remote_code=trust_remote_code), of)
    loaded = whole_model(model, dtype="auto", trust_remote_code=trust_remote_code, **right)
    vocab_size = loaded.config.get_text_config().vocab_size
    if ids := mend_ids(loaded.generation_config, vocab_size):
        print(say_ids(GENERATION_CONFIG, ids, vocab_size), file=sys.stderr)
    if base_of(model) is not None:
        from .training.balance.selection_bias import BIAS_FILE, load_router_bias

        if (Path(model) / BIAS_FILE).is_file():
            load_router_bias(loaded, model)
    if quantize is None and getattr(loaded, "hf_quantizer", None) is not None:  # which has put it where it computes
        return loaded.eval()
    return loaded.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def check_model(model: str | Path, trust_remote_code: bool = False) -> None:
    """Raises FileNotFoundError, OSError or ValueError where `model` has no config that loads. No weights are read."""
    # A path that is not there would otherwise be asked for on the Hub.
    if not Path(model).is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(model)):
        raise FileNotFoundError(f"{model} is neither a folder nor a model id such as owner/name.")
    if (base := base_of(model)) is not None:
        import peft  # noqa: F401  (Transformers would take the folder for one without a model)

        try:
            return check_model(base, trust_remote_code)
        except OSError as error:
            raise OSError(f"{model} is an adapter, and its base model does not load: {error}") from error
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        # Training of some experts writes the whole model there.
        other = folder / "merged" if (folder / "merged" / "config.json").is_file() else "the folder of a saved model"
        raise FileNotFoundError(f"{folder / 'config.json'} does not exist; give {other}.")
    try:
        auto_config(model, trust_remote_code=trust_remote_code)
    except OSError as error:
        if folder.is_dir():
            raise
        raise OSError(f"{model} is no folder here and could not be had from the Hub: {error}") from error


def base_of(model: str | Path) -> str | None:
    """The model that an adapter in the folder `model` is for; None where there is no adapter, or a model beside it.

    Raises ValueError where the adapter does not say it.
    """
    path = Path(model) / "adapter_config.json"
    if not path.is_file() or (Path(model) / "config.json").is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not say which model it adapts: give base_model_name_or_path.") from error
