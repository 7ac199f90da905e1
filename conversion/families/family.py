"""What a table says about a model family, and how it is read.

A table maps a family of Transformers to hf_moe twice: its config fields and its tensor names. Every field of the
family's config class must be accounted for, so that nothing which changes the model's output is dropped silently.
"""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...model.configuration_hf_moe import HfMoeConfig
from .regions import Part, Region, Row, Rows, regions

if TYPE_CHECKING:
    from ..files.checkpoint import Entry


class Computed(NamedTuple):
    """A field of hf_moe that is worked out from fields of the family, and on export these from fields of hf_moe."""

    reads: tuple[str, ...]
    value: Callable[[PreTrainedConfig], Any]
    inverse: Callable[[HfMoeConfig], dict[str, Any]] = lambda config: {}  # another row gives them


class MultiToken(NamedTuple):
    """Layers for multi-token prediction that are stored as if they followed the last one.

    field: the family's field that counts them. tensors: beginnings of names within such a layer, hf_moe's and then the
    family's, where they differ. copies: tensors within it that repeat one of the model.
    """

    field: str
    tensors: Mapping[str, str]
    copies: Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """One model family of Transformers, as a table.

    fields: hf_moe field -> the family's field of the same meaning, or a `Computed`.
    constants: hf_moe fields that are the same for every checkpoint of the family.
    required: fields of the family that hf_moe can carry with this one value only.
    neutral: fields that do not change what the model computes, or that its config class folds into others.
    undeclared: fields that the family's code reads although its config class does not declare them.
    tensors: rows for the names that differ; {layer} is one layer's index. A name without a row stays as it is.
    layouts: further rows, by how the experts are stored, the released one first. {expert} runs over all experts.
    ignored_tensors: patterns of tensors that old checkpoints hold and Transformers computes anew.
    mtp: how the layers for multi-token prediction are stored.
    dropped_mtp: patterns of tensors for multi-token prediction that hf_moe has no place for.
    own_config: the config class and the model's class name of a family that Transformers lacks.
    theta_elsewhere: whether the release says RoPE's theta where Transformers does not look.
    class_name: what the release calls the model's class, where Transformers has that of another family for it.
    """

    model_type: str
    fields: Mapping[str, str | Computed]
    constants: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, Any] = field(default_factory=dict)
    neutral: frozenset[str] = frozenset()
    undeclared: frozenset[str] = frozenset()
    tensors: Rows = field(default_factory=dict)
    layouts: Mapping[str, Rows] = field(default_factory=lambda: {"fused": {}})
    ignored_tensors: tuple[str, ...] = (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)
    mtp: MultiToken | None = None
    dropped_mtp: tuple[str, ...] = ()
    own_config: tuple[type[PreTrainedConfig], str] | None = None
    theta_elsewhere: bool = False
    class_name: str | None = None

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        return self.own_config[0] if self.own_config else CONFIG_MAPPING[self.model_type]

    @property
    def read_config(self) -> Callable[..., PreTrainedConfig]:
        """What reads the config of a folder."""
        return (self.config_class if self.own_config else AutoConfig).from_pretrained

    @property
    def architecture(self) -> str:
        """The name of the family's class with a language-modelling head."""
        if self.own_config:
            return self.own_config[1]
        return self.class_name or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[self.model_type]

    @property
    def known(self) -> bool:
        """Whether the installed Transformers has it, or need not have it."""
        return self.own_config is not None or self.model_type in CONFIG_MAPPING

    def accounted_fields(self) -> set[str]:
        """Every field of the family's config class that the table knows."""
        read = set()
        for source in self.fields.values():
            read |= set(source.reads) if isinstance(source, Computed) else {source}
        return (read | set(self.required) | self.neutral) - self.undeclared

    def hf_moe_fields(self, config: PreTrainedConfig) -> dict[str, Any]:
        """The keyword arguments of the HfMoeConfig that computes what `config` computes.

        Raises a ValueError that names the field which hf_moe cannot carry.
        """
        declared = {f.name: f for f in fields(type(config))}
        required = COMMON_REQUIRED | self.required
        for name, only in required.items():
            value = getattr(config, name, only)
            if value != only:
                raise ValueError(f"{self.model_type} field {name}={value!r} cannot be carried; only {only!r} can.")
        for name in declared.keys() - self.accounted_fields() - COMMON_NEUTRAL - required.keys():
            value = getattr(config, name)
            if value != declared[name].default:
                raise ValueError(
                    f"{self.model_type} field {name}={value!r} cannot be carried: hf_moe does not know it."
                )
        carried = dict(self.constants)
        for target, source in self.fields.items():
            value = source.value(config) if isinstance(source, Computed) else getattr(config, source, None)
            carried[target] = copy.deepcopy(value)
        return carried

    def family_fields(self, config: HfMoeConfig) -> dict[str, Any]:
        """The table read backwards: the fields of the family's config that come nearest to `config`."""
        carried = {name: only for name, only in self.required.items() if only is not None}
        for target, source in self.fields.items():
            carried |= source.inverse(config) if isinstance(source, Computed) else {source: plain(config, target)}
        return copy.deepcopy(carried)

    def stored_name(self, target: str, config: HfMoeConfig) -> str:
        """The hf_moe name `target`, of one of the layers for multi-token prediction, as that of an ordinary layer."""
        found = re.fullmatch(r"model\.mtp_layers\.(\d+)\.(.+)", target)
        if found is None or self.mtp is None:
            return target
        name = found[2]
        begin = next((begin for begin in self.mtp.tensors if name.startswith(begin)), "")
        return f"{mtp_prefix(config, int(found[1]))}{self.mtp.tensors.get(begin, '')}{name.removeprefix(begin)}"

    def row(self, target: str, rows: Rows, config: HfMoeConfig) -> Row:
        """The row of the hf_moe tensor `target`, with its layer's index in the names."""
        target = self.stored_name(target, config)
        layer = re.search(r"\.layers\.(\d+)\.", target)
        if layer is None:
            return rows.get(target, (target,))
        pattern = target.replace(layer[0], ".layers.{layer}.", 1)

        def filled(part: Part) -> Part:
            if isinstance(part, str):
                return part.replace("{layer}", layer[1])
            return part._replace(name=filled(part.name))

        return tuple(map(filled, rows.get(pattern, (pattern,))))

    def regions(
        self, shapes: Mapping[str, tuple[int, ...]], layout: str, config: HfMoeConfig
    ) -> dict[str, list[Region]]:
        """Where each hf_moe tensor of `shapes` lies in the family's tensors."""
        rows = {**self.tensors, **self.layouts[layout]}
        return regions(shapes, lambda target: self.row(target, rows, config), config.num_experts)

    def copies(self, config: HfMoeConfig) -> dict[str, str]:
        """Tensors that the family stores twice: the name of the copy, and of what it repeats."""
        if self.mtp is None:
            return {}
        prefixes = [mtp_prefix(config, index) for index in range(config.num_mtp_layers)]
        return {f"{prefix}{copy}": name for prefix in prefixes for copy, name in self.mtp.copies.items()}

    def layout_of(
        self, shapes: Mapping[str, tuple[int, ...]], available: "Mapping[str, Entry]", config: HfMoeConfig
    ) -> str:
        """The layout in which the `available` tensors have most of what `shapes` calls for: the one that was meant."""

        def fit(layout: str) -> tuple[int, int]:
            found = self.regions(shapes, layout, config).values()
            held = {x.name: x.shape for parts in found for x in parts if x.name in available}
            return len(held), sum(available[name].shape == shape for name, shape in held.items())

        return max(self.layouts, key=fit)

    def match(
        self, shapes: Mapping[str, tuple[int, ...]], available: "Mapping[str, Entry]", config: HfMoeConfig
    ) -> dict[str, list[Region]]:
        """Where each hf_moe tensor of `shapes` lies, in whichever layout the `available` tensors show.

        Raises a ValueError that names the first missing tensor.
        """
        meant = self.regions(shapes, self.layout_of(shapes, available, config), config)
        missing = dict.fromkeys(x.name for parts in meant.values() for x in parts if x.name not in available)
        if not missing:
            return meant
        raise ValueError(
            f"The checkpoint lacks {next(iter(missing))}, which its config calls for ({len(missing)} tensors "
            f"missing of the {self.model_type} family)."
        )


def plain(config: HfMoeConfig, name: str) -> Any:
    """The field's value, a whole number as the float that it may be: some families insist on that."""
    value = getattr(config, name)
    return float(value) if type(value) is int and float in get_args(HfMoeConfig.__annotations__[name]) else value


def mtp_prefix(config: HfMoeConfig | PreTrainedConfig, index: int) -> str:
    return f"model.layers.{config.num_hidden_layers + index}."


def plain_rope(config: PreTrainedConfig) -> dict | None:
    """The RoPE parameters as they are, with any scaling type. These families rotate whole heads."""
    rope = config.rope_parameters
    if rope and rope.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(
            f"{config.model_type} field partial_rotary_factor={rope['partial_rotary_factor']!r} cannot be carried: "
            f"Transformers' {config.model_type} does not read it."
        )
    return rope


def same(*names: str) -> dict[str, str]:
    """Rows for fields that both sides call alike."""
    return {name: name for name in names}


# What every decoder of Transformers has under one name. Token ids and use_cache change generation, so they go along.
DECODER_FIELDS = {
    **same("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"),
    **same("rms_norm_eps", "tie_word_embeddings", "num_attention_heads", "num_key_value_heads"),
    **same("attention_dropout", "hidden_act", "initializer_range", "use_cache"),
    **same("pad_token_id", "bos_token_id", "eos_token_id"),
    "rope_parameters": Computed(
        ("rope_parameters",), plain_rope, lambda config: {"rope_parameters": config.rope_parameters}
    ),
}

# Fields of every config: what the checkpoint is called and how outputs are handed over.
COMMON_NEUTRAL = frozenset(
    {"transformers_version", "architectures", "dtype", "output_hidden_states", "return_dict"}
    | {"id2label", "label2id", "problem_type", "chunk_size_feed_forward"}
)
COMMON_REQUIRED = {"is_encoder_decoder": False}
