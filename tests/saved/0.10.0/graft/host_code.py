"""A host whose code comes with its checkpoint: it runs by its user's consent alone, `trust_remote_code=True`."""

from functools import cache
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

NEEDED = ("AutoConfig", "AutoModelForCausalLM")


class UnreadConfig(PreTrainedConfig):
    """The fields of a config whose class is in code that was not run."""


@cache
def unread(model_type: str) -> type[UnreadConfig]:
    return type("UnreadConfig", (UnreadConfig,), {"model_type": model_type})


def brings_code(said: dict[str, Any]) -> bool:
    """Whether a config's dict names the code of its classes, in its own folder."""
    names = said.get("auto_map")
    return isinstance(names, dict) and all(isinstance(names.get(x), str) and "--" not in names[x] for x in NEEDED)


def is_own(config: PreTrainedConfig) -> bool:
    """Whether a config's class is none of Transformers', or unread."""
    return not type(config).__module__.startswith("transformers.")


def with_code(said: dict[str, Any], folder: Any, **where: Any) -> PreTrainedConfig:
    """The config of this dict by its own class, whose model Transformers then knows. Runs the code in `folder`."""
    kind, host = (get_class_from_dynamic_module(said["auto_map"][name], str(folder), **where) for name in NEEDED)
    MODEL_FOR_CAUSAL_LM_MAPPING.register(kind, host, exist_ok=True)
    return kind.from_dict(dict(said))


def save_code(config: PreTrainedConfig, folder: Any) -> None:
    """Write the code of such a config and of its model to `folder`."""
    if is_own(config) and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        for kind in (type(config), MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]):
            custom_object_save(kind, folder)
