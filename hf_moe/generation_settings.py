"""What configs say of generation, in a form that loads and that every save takes: before anything is built by it.

Ids of special tokens that a model has no row for are left out, for nothing could be read or written with them, and
`nn.Embedding` refuses one as its padding, or, below 0, counts it from the end and never trains that row. Flags that
have no effect beside the others are left out, too: with them Transformers loads a model, and does not save it again.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from .reading import auto_config, reason

FILE = "generation_config.json"
IDS = (
    *("pad_token_id", "bos_token_id", "eos_token_id"),
    *("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"),
)
# Of a GenerationConfig, by what they have no effect without.
FLAGS = {
    "do_sample": (*("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),),
    "num_beams": ("early_stopping", "length_penalty"),
    "use_cache": ("cache_implementation", "cache_config"),
    "return_dict_in_generate": ("output_scores", "output_logits", "output_attentions", "output_hidden_states"),
}


def ids_outside(said: Mapping[str, Any], vocab_size: int) -> dict[str, int | list[int] | None]:
    """Those of `IDS` in `said` that are none of `vocab_size` rows, and what is left of each: of a list the others."""
    found = {}
    for name in IDS:
        ids = said.get(name)
        listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
        inside = [x for x in listed if isinstance(x, int) and 0 <= x < vocab_size]
        if len(inside) < len(listed):
            found[name] = inside or None
    return found


def mend_ids(config: PreTrainedConfig | GenerationConfig, vocab_size: int) -> list[str]:
    """Leave out of `config` the ids that `ids_outside` finds; returns what it left out, in words."""
    said = {name: getattr(config, name, None) for name in IDS}
    found = ids_outside(said, vocab_size)
    for name, rest in found.items():
        setattr(config, name, rest)
    return [f"{name} {said[name]}" for name in found]


def say_ids(what: str, left_out: list[str], vocab_size: int) -> str:
    padding = ", and none of them is for padding" if any("pad" in said for said in left_out) else ""
    return f"{what}: {' and '.join(left_out)} left out: the model's rows are 0 to {vocab_size - 1}{padding}"


def mended_config(model: str | Path, **kwargs: Any) -> tuple[PreTrainedConfig | None, str | None]:
    """The config of a model to load, and what was left out of it, in one line; (None, None) where all is right.

    `kwargs` are those of `AutoConfig.from_pretrained`. A folder without a config, as of an adapter, is right, too.
    """
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        return None, None
    config = auto_config(model, **kwargs)
    vocab_size = getattr(config.get_text_config(), "vocab_size", None)
    left_out = [] if vocab_size is None else mend_ids(config.get_text_config(), vocab_size)
    return (config, say_ids(str(model), left_out, vocab_size)) if left_out else (None, None)


def mend_generation_config(config: GenerationConfig, vocab_size: int | None) -> str | None:
    """Leave out ids without a row and flags without an effect; returns what was left out, in one line, or None.

    Raises a ValueError of one line for what no generation could do.
    """
    left_out = [] if vocab_size is None else mend_ids(config, vocab_size)
    said = objection(config)
    for without, names in FLAGS.items():
        for name in names:
            if f"`{name}`" in said and getattr(config, name, None) is not None:
                left_out.append(f"{name} {getattr(config, name)} (without effect: {without} is not set)")
                setattr(config, name, None)
    if said := objection(config):
        raise ValueError(f"{FILE} cannot be saved, so correct it: {said}")
    return f"left out of {FILE}: {', '.join(left_out)}" if left_out else None


def objection(config: GenerationConfig) -> str:
    """What Transformers has against saving it, in one line; nothing where it has nothing."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        return " ".join(str(error).split())
    return ""


def check_generation_config(folder: Path) -> None:
    """Raises a ValueError that names the generation config in `folder` where no model would load beside it."""
    path = folder / FILE
    if not path.is_file():
        return
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(said, dict):
            raise ValueError(f"it holds a {type(said).__name__}, not an object.")
        GenerationConfig.from_dict(said)
    except Exception as error:  # of Transformers, which computes with what it reads before it checks it
        raise ValueError(f"{path} cannot be used, so correct or remove it: {reason(error)}") from error


def write_mended(source: Path, target: Path, vocab_size: int) -> str | None:
    """Copy a generation_config.json, less the ids without a row; returns what was left out, in one line, or None."""
    said = json.loads(source.read_text(encoding="utf-8"))
    found = ids_outside(said, vocab_size)
    left_out = [f"{name} {said[name]}" for name in found]
    if not found:
        target.write_bytes(source.read_bytes())
        return None
    said = {name: found.get(name, value) for name, value in said.items() if found.get(name, value) is not None}
    target.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return say_ids(FILE, left_out, vocab_size)
