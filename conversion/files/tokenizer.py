"""The tokenizer of a converted model must be the one that the source has, though its files name no family any more."""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ...reading import auto_tokenizer
from .checkpoint import read_json

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint folder, None where it has none. Raises a ValueError of one line."""
    if not any((folder / file).exists() for file in VOCABULARY_FILES):
        return None
    return auto_tokenizer(folder, f"The tokenizer in {folder} cannot be loaded", trust_remote_code=False)


def keep_class(source: PreTrainedTokenizerBase, folder: Path) -> None:
    """Name the class of `source` in `folder`, unless Transformers finds it there by itself.

    Where the files do not name a class, Transformers goes by the model_type of the config, which is another now.
    """
    if type(load_tokenizer(folder)) is type(source):
        return
    path = folder / "tokenizer_config.json"
    said = read_json(path) if path.exists() else {}
    said["tokenizer_class"] = type(source).__name__
    path.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if type(load_tokenizer(folder)) is not type(source):
        raise ValueError(f"The tokenizer class {type(source).__name__} cannot be carried to another family.")
