"""A causal language model and its tokenizer from a folder or the Hub."""

import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase


def load(model: str | Path, trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, as `load_model` has it, and its tokenizer.

    Raises FileNotFoundError, OSError or ValueError where either cannot be had.
    """
    check_model(model, trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (ValueError, OSError) as error:
        raise ValueError(f"{model} has no tokenizer that can be loaded: {error}") from error
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):  # made from the config, without files
        raise ValueError(f"{model} has no tokenizer; save one beside the model.")
    return load_model(model, trust_remote_code), tokenizer


def load_model(model: str | Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model, which `check_model` has let through, in its saved precision and on the GPU if there is one."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", trust_remote_code=trust_remote_code)
    return loaded.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def check_model(model: str | Path, trust_remote_code: bool = False) -> None:
    """Raises FileNotFoundError, OSError or ValueError where `model` has no config that loads. No weights are read."""
    # A path that is not there would otherwise be asked for on the Hub.
    if not Path(model).is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(model)):
        raise FileNotFoundError(f"{model} is neither a folder nor a model id such as owner/name.")
    folder = Path(model)
    if folder.is_dir() and not (folder / "config.json").is_file():
        # Training of an adapter, or of some experts, writes the whole model there.
        other = folder / "merged" if (folder / "merged" / "config.json").is_file() else "the folder of a saved model"
        raise FileNotFoundError(f"{folder / 'config.json'} does not exist; give {other}.")
    try:
        AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except OSError as error:
        if folder.is_dir():
            raise
        raise OSError(f"{model} is no folder here and could not be had from the Hub: {error}") from error
