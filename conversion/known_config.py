"""The hf_moe config of any model that hf_moe knows, from its config alone: a saved model's, or a preset's."""

from pathlib import Path
from typing import Any

from ..model.configuration_hf_moe import HfMoeConfig
from ..model.configuration_hf_moe_graft import HfMoeGraftConfig
from ..reading import built
from ..sizes.presets import PRESETS, preset, preset_config
from .families import DENSE_FAMILIES, IMPORTED
from .files.checkpoint import read_config
from .files.source import is_hub_id, locate
from .files.text_part import TEXT_PARTS, text_config


def find_config(model: str, trust_remote_code: bool = False) -> tuple[HfMoeConfig | HfMoeGraftConfig, dict[str, Any]]:
    """The config of a saved model, here or on the Hub, or of a preset, and what is known about it.

    trust_remote_code: run the code of a graft's host, or of a router, that lies beside it.

    Raises FileNotFoundError or ValueError, in one line, where there is none.
    """
    folder = Path(model).expanduser()
    if folder.is_dir() or is_hub_id(model):
        folder = locate(model, ("config.json", "*.py") if trust_remote_code else ("config.json",)).folder
        config = folder_config(folder, trust_remote_code)
        return config, {"provenance": config.provenance} if config.provenance else {}
    if model not in PRESETS and (folder.exists() or "/" in model):
        raise FileNotFoundError(
            f"{model} is no folder; give the folder of a saved model, its id on the Hub, or a preset's name."
        )
    entry = preset(model)
    return preset_config(model), {key: entry[key] for key in ("title", "source", "differs", "published")}


def folder_config(folder: Path, trust_remote_code: bool = False) -> HfMoeConfig | HfMoeGraftConfig:
    """The config in a folder: hf_moe's own, or the hf_moe config of the same model in a family that hf_moe reads."""
    said = read_config(folder)
    model_type, families = said.get("model_type"), {**DENSE_FAMILIES, **IMPORTED}
    is_part = model_type in TEXT_PARTS  # of a model that sees pictures, the language model is inspected
    if is_part:
        model_type = TEXT_PARTS[model_type].family
    ours = {kind.model_type: kind for kind in (HfMoeConfig, HfMoeGraftConfig)}
    if model_type not in ours and model_type not in families:
        known = ", ".join([*ours, *families, *TEXT_PARTS])
        raise ValueError(
            f"{folder} has model_type {model_type!r}, which hf_moe does not read; it reads {known}. `hf-moe card` "
            "says how large a saved model of any family is."
        )
    invalid = f"{folder / 'config.json'} is no valid {model_type} config"
    if model_type in ours:
        config = built(ours[model_type].from_pretrained, invalid, folder)
        if trust_remote_code and model_type == HfMoeGraftConfig.model_type:
            built(config.run_code, invalid, folder)
        if trust_remote_code:
            built(config.run_router_code, invalid, folder)
        return config
    original = built(families[model_type].read_config, invalid, folder)
    if is_part:
        original = text_config(original, said)
    fields = families[model_type].hf_moe_fields(original)
    if model_type in DENSE_FAMILIES:
        fields["mlp_layer_types"] = ["dense"] * original.num_hidden_layers
    return built(HfMoeConfig, f"{folder} cannot be carried", **fields)
