"""Checkpoints of models that Transformers does not know, their code beside them: it runs where the user lets it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ...hub.renew import code_in, todays_code
from ...model.configuration_hf_moe_graft import HfMoeGraftConfig
from ...model.host_code import NEEDED, brings_code, with_code
from ...reading import auto_config, built
from .checkpoint import read_config


def is_own(said: Mapping[str, Any]) -> bool:
    """Whether a config.json is of such a checkpoint."""
    return said.get("model_type") not in CONFIG_MAPPING and brings_code(said)


def config_of(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config in a folder. Raises OSError or a ValueError of one line, also for code that may not run."""
    said = read_config(folder)
    if not is_own(said):
        grafted = said.get("model_type") == HfMoeGraftConfig.model_type  # onto such a model, perhaps
        brings_router = said.get("router_code") is not None
        return auto_config(folder, trust_remote_code=trust_remote_code and (grafted or brings_router))
    module = said["auto_map"]["AutoModelForCausalLM"].split(".")[0]
    if not trust_remote_code:
        raise ValueError(
            f"{folder.name} is a {said['model_type']}, whose code is in {module}.py beside it: look at that, and let "
            "it run with trust_remote_code=True (--trust-remote-code)."
        )
    return built(with_code, f"{folder / 'config.json'} is no valid {said['model_type']} config", said, folder)


def own_code(folder: Path) -> list[str]:
    """The files of that code, none where Transformers knows the model.

    Raises ValueError where one would take the place of hf_moe's.
    """
    said = read_config(folder)
    if not is_own(said):
        return []
    code = code_in(folder, {"auto_map": {name: said["auto_map"][name] for name in NEEDED}})
    taken = sorted(set(code) & set(todays_code(HfMoeGraftConfig.model_type)))
    if taken:
        raise ValueError(f"{folder / taken[0]} is named as a file of hf_moe's, beside which it would lie: rename it.")
    return code
