"""A card's metadata, which the Hub reads, and what it depends on: the kind of model, its task, what it was made of."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from ..routers import routed_experts
from .folder import INHERITED, SavedModel
from .tables import RESHAPED

OWN_CAUSAL = ("HfMoeForCausalLM", "HfMoeGraftForCausalLM")
# Auto class -> (the Hub's name of its task, the architectures that it loads: hf_moe's own and Transformers').
AUTO_CLASSES = {
    "AutoModelForCausalLM": ("text-generation", {*OWN_CAUSAL, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()}),
    "AutoModelForImageTextToText": (
        "image-text-to-text",
        {"HfMoeGraftForImageTextToText", *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()},
    ),
    "AutoModelForSequenceClassification": (
        "text-classification",
        {"HfMoeForSequenceClassification", *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values()},
    ),
    "AutoModelForTokenClassification": (
        "token-classification",
        {"HfMoeForTokenClassification", *MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values()},
    ),
    "AutoModel": ("feature-extraction", {"HfMoeModel"}),
}
# Method of conversion -> the template of the card.
TEMPLATES = {
    "upcycle": "upcycled",
    "import": "imported",
    "export": "exported",
    **dict.fromkeys(RESHAPED, "reshaped"),
}
# The Hub's words for how a model follows from its base; it has none for a change of format.
RELATIONS = {
    "adapter": "adapter",
    "expert_rows": "adapter",
    "fine_tuned": "finetune",
    "merged": "merge",
    "reshaped": "finetune",
    "upcycled": "finetune",
}
LIBRARIES = {"model": "transformers", "adapter": "peft", "expert_rows": "hf_moe"}
KIND_TAGS = {"adapter": "lora", "expert_rows": "esft"}


def template_of(saved: SavedModel) -> str:
    """The name of the card's template."""
    if saved.kind != "model":
        return saved.kind
    if saved.stages or saved.results:
        return "fine_tuned"
    if saved.provenance.get("siblings"):
        return "merged"
    return TEMPLATES.get(saved.provenance.get("method"), "model")


def task_of(saved: SavedModel) -> tuple[str | None, str]:
    """The Auto class that loads the model, None where Transformers has none, and the Hub's name of its task."""
    if saved.kind != "model":
        return "AutoModelForCausalLM", "text-generation"
    architecture = (saved.config.architectures or [None])[0]
    for auto_class, (task, architectures) in AUTO_CLASSES.items():
        if architecture in architectures:
            return auto_class, task
    return None, "text-generation"


def base_models(saved: SavedModel) -> list[str]:
    """The Hub ids of what the model was made of: of the last stage of training that names one, or its origin's."""
    if saved.adapter.get("base_model_name_or_path") and is_hub_id(saved.adapter["base_model_name_or_path"]):
        return [saved.adapter["base_model_name_or_path"]]
    for stage in reversed(saved.stages):
        if stage.get("base_revision") is not None:
            return [stage["base_model"]]
    # A source with a revision came from the Hub, which knows a base model by its id; a local folder is none.
    origins = [saved.provenance, *saved.provenance.get("siblings", [])]
    return [origin["source"] for origin in origins if origin.get("revision") is not None]


def is_hub_id(name: str) -> bool:
    """Whether `name` can be the Hub's name of a model rather than a folder here."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists()


def metadata(
    saved: SavedModel,
    template: str,
    name: str,
    task: str,
    told: dict[str, Any],
    earlier: ModelCard | None,
    results: list[EvalResult],
    keep: dict[str, Any],
) -> ModelCardData:
    """The card's YAML: what the user tells comes first, then what an earlier card was told, then what the folder says.

    Licence and language are those of the model that this one is made of, if its own card said so; so are the data
    sets, to which training adds its own.
    """
    first = saved.provenance.get("source_card", {})
    known = {name: value for stage in saved.stages for name, value in stage.get("source_card", {}).items()}
    known = first | known
    known["datasets"] = unique(known.get("datasets", []), *(stage.get("datasets", []) for stage in saved.stages))
    base = base_models(saved)
    known["base_model"] = base[0] if len(base) == 1 else base
    before = {} if earlier is None else earlier.data.to_dict()
    said = {key: told.get(key) or before.get(key) or known.get(key) or None for key in ("base_model", *INHERITED)}
    if told.get("license"):
        said["license_name"] = said["license_link"] = None  # of another licence
    keep = {key: value for key, value in keep.items() if value}
    family = saved.config.model_type if saved.config is not None else None
    method = saved.provenance.get("method")
    stages = [stage["stage"] for stage in saved.stages if "stage" in stage]
    sparse = saved.config is None or routed_experts(saved.config)[0] > 1
    derived = filter(None, [family, "mixture-of-experts" if sparse else None, method, KIND_TAGS.get(saved.kind)])
    return ModelCardData(
        **said,
        base_model_relation=RELATIONS.get(template) if said["base_model"] else None,
        library_name=LIBRARIES[saved.kind],
        pipeline_tag=task,
        tags=unique(derived, stages, told.get("tags", []), before.get("tags", [])),
        **({"model_name": name, "eval_results": results} if results else {}),
        **({"hf_moe": keep} if keep else {}),
    )


def unique(*lists: Iterable[str]) -> list[str]:
    """All that is in the lists, once each, in order; a bare string counts as a list of one."""
    return list(dict.fromkeys(x for part in lists for x in ([part] if isinstance(part, str) else part)))
