"""Opening the checkpoint that a conversion starts from: its family, its config, its tensors and its origin."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...generation_settings import check_generation_config, mend_ids, say_ids
from ...model.configuration_hf_moe import HfMoeConfig
from ...model.modeling_hf_moe import HfMoeForCausalLM
from ...reading import PROCESSOR_FILES, built
from ..families import DENSE_FAMILIES, ENCODER_DECODERS, IMPORTED, Family
from ..families.family import mtp_prefix
from ..families.regions import Region
from .block_fp8 import BlockFP8Checkpoint, block_size
from .checkpoint import WEIGHT_DTYPES, Checkpoint, check_inside, read_config
from .mxfp4 import MXFP4Checkpoint
from .text_part import TEXT_PARTS, TextCheckpoint, text_config
from .writer import Output

# Files beside the weights that go along unchanged. A README does not: it describes the other model.
CARRIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
# The card is read for the licence and the data sets; code runs where the user lets it.
DOWNLOADED_FILES = ("README.md", "*.py", "config.json", "model*.safetensors", "model.safetensors.index.json")
DOWNLOADED_FILES += CARRIED_FILES + PROCESSOR_FILES

# Keys of a config.json that describe the file or are the older spelling of a field.
BOOKKEEPING_KEYS = frozenset(
    [
        "_name_or_path",
        "auto_map",
        "model_type",
        "quantization_config",
        "rope_scaling",
        "rope_theta",
        "torch_dtype",
        "transformers_version",
    ]
)


@dataclass(frozen=True)
class Source:
    """A checkpoint, opened and checked: what the files say agrees with the config, tensor by tensor."""

    name: str  # of the folder, or the Hub id
    revision: str | None  # the Hub's commit
    family: Family
    config: PreTrainedConfig
    hf_moe_fields: Mapping[str, Any]
    ignored_config_keys: list[str]  # the family's class in Transformers does not read them
    ignored_tensors: tuple[str, ...]  # patterns of their names
    checkpoint: Checkpoint

    code = ()  # the model's class is Transformers'

    @property
    def incomparable(self) -> str | None:
        """Why Transformers cannot compute this checkpoint's logits on a CPU, None where it can."""
        if self.family.own_config:
            return f"Transformers has no class for {self.family.model_type} to compare logits with"
        if isinstance(self.checkpoint, TextCheckpoint) and not self.checkpoint.alone:
            return "Transformers does not load the language model alone from these files, to compare logits with"
        if isinstance(self.checkpoint, BlockFP8Checkpoint):
            return "Transformers does not compute with block-FP8 weights on a CPU, so there are no logits to compare"
        ropes = (self.hf_moe_fields["rope_parameters"], self.config.rope_parameters)
        trained, read = ((rope or {}).get("rope_theta") for rope in ropes)
        if self.family.theta_elsewhere and trained != read:
            return f"Transformers reads rope_theta={read} from this config, but the model was trained with {trained}"
        return None

    @property
    def model_type(self) -> str:
        return self.family.model_type

    @property
    def vocab_size(self) -> int:
        return self.hf_moe_fields["vocab_size"]

    @property
    def decisive(self) -> Mapping[str, Any]:
        """The fields that siblings share."""
        return self.hf_moe_fields

    def carried_files(self) -> list[Path]:
        return carried_files(self.checkpoint.folder)

    def hf_moe_config(self, **choices: Any) -> HfMoeConfig:
        """The hf_moe config of this checkpoint with the `choices` of a conversion."""
        return built(HfMoeConfig, f"{self.name} cannot be carried", **self.hf_moe_fields, **choices)

    def outputs(self, config: HfMoeConfig) -> dict[str, Output]:
        """Every tensor of the hf_moe model that `config` describes, made of this checkpoint's bytes.

        Raises a ValueError that names the tensor which is missing, left over, or of another shape or dtype.
        """
        shapes = built(tensor_shapes, f"{self.name} cannot be carried", config)
        entries = self.checkpoint.entries
        regions = self.family.match(shapes, entries, config)
        used = {region.name for parts in regions.values() for region in parts}
        for name in entries:
            if name not in used and not any(re.fullmatch(p, name) for p in self.ignored_tensors):
                self._accept_left_over(name, config)
        return {name: self._output(name, shapes[name], parts) for name, parts in regions.items()}

    def _accept_left_over(self, name: str, config: HfMoeConfig) -> None:
        """What is stored twice, as a tied head may be, must be the same twice. Anything else is refused."""
        copies = self.family.copies(config)
        if config.tie_word_embeddings:
            copies = {copy: name.replace("lm_head", "model.embed_tokens") for copy, name in copies.items()}
            copies["lm_head.weight"] = "model.embed_tokens.weight"
        if name in copies:
            if not torch.equal(self.checkpoint.tensor(name), self.checkpoint.tensor(copies[name])):
                why = "tie_word_embeddings=true" if name == "lm_head.weight" else "that they are shared"
                raise ValueError(f"{name} differs from {copies[name]} although the config says {why}.")
            return
        if any(re.fullmatch(pattern, name) for pattern in self.family.dropped_mtp):
            raise ValueError(
                f"The checkpoint holds {name}: hf_moe cannot carry the multi-token prediction of a "
                f"{self.family.model_type}. To do without it, say drop_mtp=True (--drop-mtp)."
            )
        raise ValueError(
            f"The checkpoint holds {name}, which a {self.family.model_type} with this config does not use."
        )

    def _output(self, name: str, shape: tuple[int, ...], regions: list[Region]) -> Output:
        if not regions:
            zeros = torch.zeros(shape, dtype=self.checkpoint.dtype)
            return Output(name, zeros.dtype, shape, lambda: [zeros], zeros.nbytes)
        first = regions[0].name
        dtype = self.checkpoint.entries[first].dtype
        if dtype not in WEIGHT_DTYPES and not name.endswith(".hash_table"):
            raise ValueError(f"{first} is {dtype}: without a quantization_config hf_moe reads floats only.")
        for region in regions:
            entry = self.checkpoint.entries[region.name]
            if entry.dtype != dtype:
                raise ValueError(f"{region.name} is {entry.dtype}, but {first} is {dtype}; they become one tensor.")
            if entry.shape != region.shape:
                raise ValueError(
                    f"{region.name} has shape {list(entry.shape)}, but the config calls for {list(region.shape)}."
                )
        held = max(map(self._held, regions))
        return Output(name, dtype, shape, lambda: map(self._read, regions), held, partial(self._part, regions))

    def _part(self, regions: list[Region], index: int, count: int) -> torch.Tensor:
        """Part `index` of `count` equal ones of the tensor whose rows are those of the regions: [rows]."""
        if count >= len(regions):
            parts = count // len(regions)
            return self._read(regions[index // parts]).reshape(parts, -1)[index % parts]
        each = len(regions) // count
        return torch.cat([self._read(x).reshape(-1) for x in regions[index * each : (index + 1) * each]])

    def _held(self, region: Region) -> int:
        """Bytes of memory that reading a region takes: a block that is computed, and what is not as it lies in it."""
        entry = self.checkpoint.entries[region.name]
        copied = region.transposed or region.rows.step not in (None, 1)
        return (self.checkpoint.computes(region.name) + copied) * entry.nbytes // region.blocks

    def _read(self, region: Region) -> torch.Tensor:
        return region.of(self.checkpoint.part(region.name, region.block, region.blocks))


def carried_files(folder: Path, further: tuple[str, ...] = ()) -> list[Path]:
    """Tokenizer, chat template, generation config, licence and `further` files, relative to the folder.

    Raises a ValueError where one is a link to a file elsewhere, which nobody meant to publish.
    """
    found = {path for pattern in CARRIED_FILES + further for path in folder.glob(pattern) if path.is_file()}
    files = sorted(path.relative_to(folder) for path in found)
    for file in files:
        check_inside(folder, file)
    return files


def tensor_shapes(config: HfMoeConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what a checkpoint of HfMoeForCausalLM holds, from a model without memory."""
    with torch.device("meta"):
        model = HfMoeForCausalLM(config)
    tied = model.all_tied_weights_keys
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


class Place(NamedTuple):
    """Where a checkpoint is: its folder here, its name, the Hub's commit."""

    folder: Path
    name: str
    revision: str | None


def is_hub_id(src: str | Path) -> bool:
    """Whether `src` is no path here, and may be a Hub id."""
    known = Path(src).expanduser().exists() or str(src).startswith(".")
    return not known and re.fullmatch(r"[\w.-]+/[\w.-]+", str(src)) is not None


def locate(src: str | Path | Place, files: Sequence[str] = DOWNLOADED_FILES) -> Place:
    """The place of a checkpoint. Downloads its `files` where `src` is no folder but may be a Hub id."""
    if isinstance(src, Place):
        return src
    folder = Path(src).expanduser()
    if folder.is_dir():
        return Place(folder, folder.resolve().name, None)
    if not is_hub_id(src):
        raise FileNotFoundError(f"The checkpoint folder {src} does not exist.")
    try:
        folder = Path(snapshot_download(str(src), allow_patterns=list(files)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{src} is no folder here and could not be had from the Hub: {reason}") from error
    return Place(folder, str(src), folder.name)


def mend(config: PreTrainedConfig, name: str) -> None:
    """Leave out of the config of checkpoint `name` the special tokens that the model has no row for, and say so."""
    if left_out := mend_ids(config, config.vocab_size):
        print(say_ids(name, left_out, config.vocab_size), file=sys.stderr)


def open_source(src: str | Path | Place, families: Mapping[str, Family], drop_mtp: bool = False) -> Source:
    """Open a checkpoint of one of `families`, without its layers for multi-token prediction if `drop_mtp`.

    Raises FileNotFoundError or a ValueError of one line: no checkpoint, an unknown family, a field that hf_moe cannot
    carry, damaged files.
    """
    folder, name, revision = locate(src)
    said = read_config(folder)
    model_type, quantization = said.get("model_type"), said.get("quantization_config")
    part = TEXT_PARTS.get(model_type)
    is_part = part is not None and part.family in families
    model_type = part.family if is_part else model_type
    if model_type not in families:
        raise ValueError(_unknown_family(name, model_type, families))
    family = families[model_type]
    invalid = f"{folder / 'config.json'} is no valid {model_type} config"
    config = built(family.read_config, invalid, folder, trust_remote_code=False)
    if is_part:
        config, said = text_config(config, said), said.get("text_config", {})
    check_generation_config(folder)
    mend(config, name)
    if said.get("per_layer_config"):
        raise ValueError(f"{model_type} field per_layer_config cannot be carried: layers must be alike.")
    ignored = [name for name in unread_keys(said, config) if name not in family.undeclared]
    if ignored and family.own_config:  # no class of Transformers says that the field means nothing
        raise ValueError(f"{model_type} field {ignored[0]}={said[ignored[0]]!r} cannot be carried: unknown.")
    ignored_tensors = family.ignored_tensors
    mtp_layers = getattr(config, family.mtp.field, 0) if family.mtp else 0
    if drop_mtp:
        ignored_tensors += family.dropped_mtp
    if drop_mtp and mtp_layers:
        ignored_tensors += tuple(re.escape(mtp_prefix(config, index)) + ".+" for index in range(mtp_layers))
        setattr(config, family.mtp.field, 0)
    checkpoint = TextCheckpoint(folder, quantization, part.alone) if is_part else open_weights(folder, quantization)
    first = mtp_prefix(config, 0)
    if mtp_layers and not drop_mtp and not any(tensor.startswith(first) for tensor in checkpoint.entries):
        raise ValueError(
            f"The config says {family.mtp.field}={mtp_layers}, but the checkpoint lacks {first}*. To do without "
            "multi-token prediction, say drop_mtp=True (--drop-mtp)."
        )
    return Source(
        name=name,
        revision=revision,
        family=family,
        config=config,
        hf_moe_fields=family.hf_moe_fields(config),
        ignored_config_keys=ignored,
        ignored_tensors=ignored_tensors,
        checkpoint=checkpoint,
    )


def unread_keys(said: Mapping[str, Any], config: PreTrainedConfig) -> list[str]:
    """What a config.json says and the config's class does not read."""
    known = {f.name for f in fields(type(config))} | set(config.attribute_map) | set(config.attribute_map.values())
    return sorted(set(said) - known - BOOKKEEPING_KEYS)


def open_weights(folder: Path, quantization: dict[str, Any] | None) -> Checkpoint:
    """The weights in `folder`, read as `quantization` says. Raises a ValueError that names another way to quantize."""
    if quantization is None:
        return Checkpoint(folder)
    if quantization.get("quant_method") == "mxfp4":
        return MXFP4Checkpoint(folder)
    return BlockFP8Checkpoint(folder, block_size(quantization))


def _unknown_family(name: str, model_type: Any, families: Mapping[str, Family]) -> str:
    known = ", ".join([*families, *(whole for whole, part in TEXT_PARTS.items() if part.family in families)])
    part = TEXT_PARTS[model_type].family if model_type in TEXT_PARTS else model_type
    if model_type in ENCODER_DECODERS:
        return f"{name} is a {model_type}, an encoder-decoder: hf_moe's models are decoders and cannot hold it."
    if HfMoeConfig.model_type in families:
        return f"{name} is a {model_type}, not an hf_moe checkpoint; import it, or upcycle it if it is dense."
    if model_type == HfMoeConfig.model_type:
        return f"{name} is an hf_moe checkpoint already; hf_moe converts {known}."
    if part in IMPORTED:
        return f"{name} is a {model_type}, already a mixture of experts: import it. Upcycling takes {known}."
    if part in DENSE_FAMILIES:
        return f"{name} is a {model_type}, a dense model: upcycle it. Importing takes {known}."
    if trains_as_it_is(model_type):
        return (
            f"{name} is a {model_type}, whose layers hf_moe's model does not have: it trains as it is, with `hf-moe "
            f"train tiny/sft --model_name_or_path {name} --train_data ROWS --output_dir OUT`. Importing takes {known}."
        )
    return f"{name} has model_type {model_type!r}, which hf_moe does not read; it reads {known}."


def trains_as_it_is(model_type: Any) -> bool:
    """Whether Transformers has a decoder with routed experts by that name: its config counts them."""
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return False
    return any("expert" in field.name for field in fields(CONFIG_MAPPING[model_type]))
