"""Configuration of a graft: another model's config, and what the experts in it are like."""

import os
from typing import Any

import transformers
from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from .configuration_hf_moe import COEFFICIENTS, HfMoeConfig
from .host_code import UnreadConfig, brings_code, is_own, save_code, unread, with_code
from .router_code import HfMoeRouterCode

# Which class answers to which Auto class when the files travel with a checkpoint.
AUTO_MAP = {
    "AutoConfig": "configuration_hf_moe_graft.HfMoeGraftConfig",
    "AutoModelForCausalLM": "modeling_hf_moe_graft.HfMoeGraftForCausalLM",
}
WITH_PICTURES = dict.fromkeys(
    ("AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
    "modeling_hf_moe_graft.HfMoeGraftForImageTextToText",
)
LEAST = {"num_experts": 1, "n_group": 1, "n_shared_experts": 0}
LEAST |= {name: 0 for name in COEFFICIENTS if name.startswith(("router", "seq", "device", "comm"))}


def built_backbone(said: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    """A backbone's config, unread where its class is in code that comes with it.

    Raises ValueError for a model type that this Transformers does not know.
    """
    if isinstance(said, PreTrainedConfig):
        return said
    fields = dict(said or {"model_type": "llama"})
    model_type = fields.pop("model_type", None)
    if model_type not in CONFIG_MAPPING and brings_code(fields):
        return unread(model_type).from_dict(fields)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"backbone has model_type {model_type!r}, which Transformers {transformers.__version__} does not know: "
            "take a newer one, or the model it came from."
        )
    return CONFIG_MAPPING[model_type](**fields)


def has_parts(backbone: PreTrainedConfig) -> bool:
    """Whether it is a model with others than a decoder of text in it."""
    decoder = type(backbone) in MODEL_FOR_CAUSAL_LM_MAPPING or isinstance(backbone, UnreadConfig)
    return backbone.get_text_config(decoder=True) is not backbone or not decoder


@strict
class HfMoeGraftConfig(HfMoeRouterCode, PreTrainedConfig):
    r"""Configuration of an [`HfMoeGraftForCausalLM`]: any decoder of Transformers with experts in it.

    backbone
    :   the config of the model that the experts are grafted onto, or its dict, with `model_type`. What is not said
        here is asked of it, and set on it: `config.hidden_size`, `config.use_cache`. Of a model that reads pictures,
        too, it is the config of the whole, whose text is asked first.

    Layers
    :   sparse_layers (indices of the decoder's layers whose dense feed-forward network becomes a mixture; default: all
        that have one), moe_intermediate_size and shared_expert_intermediate_size (of one expert; a list has one number
        for each of these layers; default: the width of the layer's own network).

    The other fields are those of [`HfMoeConfig`], with the same meaning: num_experts, num_experts_per_tok,
    n_shared_experts, shared_expert_gate, expert_input_scaling, those of routing and of training. Whether experts are
    gated, their activation and biases are those of the network that they replace.

    Raises on construction where fields contradict each other, with the numbers.
    """

    model_type = "hf_moe_graft"
    sub_configs = {"backbone": AutoConfig}
    keys_to_ignore_at_inference = HfMoeConfig.keys_to_ignore_at_inference
    attribute_map = {"num_local_experts": "num_experts", "n_routed_experts": "num_experts"}
    # What HfMoeConfig has, and no graft.
    experts_swiglu_limit = None
    num_mtp_layers = 0
    mtp_loss_coef = 0.0

    backbone: dict[str, Any] | PreTrainedConfig | None = None
    sparse_layers: list[int] | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | list[int] | None = None
    n_shared_experts: int = 0
    shared_expert_intermediate_size: int | list[int] | None = None
    shared_expert_gate: bool = False
    expert_input_scaling: bool = False

    router_type: str = "topk_softmax"
    router_args: dict[str, Any] | None = None
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = False
    routed_scaling_factor: float | int = 1.0
    expert_capacity_factor: float | int | None = None

    router_bias_update_speed: float | int = 0.0
    router_aux_loss_coef: float | int = 0.01
    seq_aux_loss_coef: float | int = 0.0
    router_z_loss_coef: float | int = 0.0
    device_aux_loss_coef: float | int = 0.0
    comm_aux_loss_coef: float | int = 0.0
    output_router_logits: bool = False
    router_code: str | None = None
    provenance: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        if self.router_args is None:
            self.router_args = {}
        backbone, self.backbone = self.backbone, None  # the host's own fields come first, and are not asked of it
        attention = kwargs.pop("attn_implementation", None)
        super().__post_init__(**kwargs)
        self.backbone = built_backbone(backbone)
        self.backbone._name_or_path = (
            ""  # what is loaded is the graft, and that it came from a folder there is not told
        )
        if attention is not None:
            self._attn_implementation = attention  # the backbone's, too
        if self.dtype is None:
            self.dtype = self.backbone.dtype

    def __getattr__(self, name: str) -> Any:
        """What only the backbone's config has."""
        owners = self._owners(name)
        if not owners:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(owners[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name in self.__dict__ or hasattr(type(self), name) or name in ("auto_map", *self.attribute_map)
        owners = [] if own else self._owners(name)
        for owner in owners:
            setattr(owner, name, value)
        if not owners:
            super().__setattr__(name, value)

    def _owners(self, name: str) -> list[PreTrainedConfig]:
        """The configs within this one that have the attribute: that of the backbone's text, and the backbone's."""
        backbone = self.__dict__.get("backbone")
        if name.startswith("_") or not isinstance(backbone, PreTrainedConfig):
            return []
        text = backbone.get_text_config(decoder=True)
        whole_alone = text is backbone or name == "tie_word_embeddings"  # of head and embeddings, it decides
        return [part for part in ([backbone] if whole_alone else [text, backbone]) if hasattr(part, name)]

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "HfMoeGraftConfig":
        """Itself: routing stands here, and sizes of the backbone's text are asked of that."""
        return self

    @property
    def processor_class(self) -> str | None:
        """What AutoProcessor asks for where the files beside the weights do not name it."""
        return PROCESSOR_MAPPING_NAMES.get(self.backbone.model_type)

    @property
    def needs_code(self) -> bool:
        """Whether the backbone's class is in code that comes with the model and was not run."""
        return isinstance(self.backbone, UnreadConfig)

    def run_code(self, folder: str | os.PathLike, **where: Any) -> None:
        """Let the backbone be of its own class, in the code that lies in `folder`."""
        if self.needs_code:
            attention = self.backbone._attn_implementation
            self.backbone = with_code(self.backbone.to_dict(), folder, **where)
            self.backbone._attn_implementation = attention

    def to_diff_dict(self) -> dict[str, Any]:
        """With all fields of a backbone whose own defaults are in code that is not run to read them."""
        said = super().to_diff_dict()
        if is_own(self.backbone):
            said["backbone"] = self.backbone.to_dict()
        return said

    @property
    def _attn_implementation(self) -> str | None:
        """The backbone's, whose parts may have others."""
        return self.__dict__.get("_attn_implementation_internal")

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict | None) -> None:
        backbone = self.__dict__.get("backbone")
        if isinstance(backbone, PreTrainedConfig):
            backbone._attn_implementation = value
            value = backbone._attn_implementation
        self._attn_implementation_internal = value

    @property
    def _experts_implementation(self) -> str | None:
        """Of the experts here: the backbone has none, and its classes refuse to be told."""
        return self.__dict__.get("_experts_implementation_internal")

    @_experts_implementation.setter
    def _experts_implementation(self, value: str | dict | None) -> None:
        self._experts_implementation_internal = value.get("") if isinstance(value, dict) else value

    def validate_amounts(self) -> None:
        """The first by name, and so the first to run: the others divide by what it checks."""
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {least}.")

    validate_experts = HfMoeConfig.validate_experts
    validate_router = HfMoeConfig.validate_router
    limits_experts = HfMoeConfig.limits_experts

    def validate_layer_type(self) -> None:
        """The backbone's own matter."""

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        # A folder saved from a Hub checkpoint must not point back to that checkpoint's code.
        self.auto_map = AUTO_MAP | (WITH_PICTURES if has_parts(self.backbone) else {})
        os.makedirs(save_directory, exist_ok=True)
        save_code(self.backbone, save_directory)
        self.name_router_code()
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        self.save_router_code(save_directory)


__all__ = ["HfMoeGraftConfig"]
