"""A dense decoder of any family, or a model that reads pictures with one, opened to have experts grafted onto it."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
)

from ...generation_settings import check_generation_config
from ...model.configuration_hf_moe import HfMoeConfig
from ...model.configuration_hf_moe_graft import HfMoeGraftConfig, has_parts
from ...model.feed_forward import FeedForward, find_feed_forwards
from ...reading import PROCESSOR_FILES
from ...routers import find_routers
from ..families import ENCODER_DECODERS
from .checkpoint import WEIGHT_DTYPES, Checkpoint, read_config
from .converted import ConvertedCheckpoint
from .file_backed import empty, stored_names
from .host import names_in_memory
from .own_code import config_of, is_own, own_code
from .source import Place, carried_files, locate, mend, unread_keys
from .writer import Output

BUFFERS = r".*\.(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)"  # computed anew, in old files
OURS = (HfMoeConfig.model_type, HfMoeGraftConfig.model_type)


@dataclass(frozen=True)
class GraftSource:
    """A checkpoint, opened and checked. model: the host's, without memory; names: its parameters' -> the files'."""

    name: str  # of the folder, or the Hub id
    revision: str | None  # the Hub's commit
    config: PreTrainedConfig
    model: PreTrainedModel
    checkpoint: Checkpoint
    names: Mapping[str, str]
    networks: Mapping[int, FeedForward]  # of the layers that have one
    ignored_config_keys: list[str]  # the host's class does not read them
    code: list[str]  # files of the host's class, where it is none of Transformers'

    incomparable = None

    @property
    def model_type(self) -> str:
        return self.config.model_type

    @property
    def vocab_size(self) -> int:
        return self.config.get_text_config().vocab_size

    @property
    def decisive(self) -> dict[str, Any]:
        """The fields that siblings share."""
        said = self.config.to_dict()
        return {name: x for name, x in said.items() if name not in ("dtype", "architectures", "transformers_version")}

    def carried_files(self) -> list[Path]:
        return [*carried_files(self.checkpoint.folder, PROCESSOR_FILES), *map(Path, self.code)]

    def outputs(self) -> dict[str, Output]:
        """Every tensor of the dense model by its name in Transformers, made of this checkpoint's bytes."""
        return {name: self.output(name) for name in self.names}

    def output(self, name: str) -> Output:
        stored = self.names[name]
        entry = self.checkpoint.entries[stored]
        held = self.checkpoint.computes(stored) * entry.nbytes
        return Output(name, entry.dtype, entry.shape, lambda: [self.checkpoint.tensor(stored)], held)


def open_graft(src: str | Path | Place, trust_remote_code: bool = False) -> GraftSource:
    """Open a dense checkpoint of any decoder of Transformers, of a model with one that reads pictures, too, or of a
    decoder that brings its code, which then runs.

    Raises FileNotFoundError or a ValueError of one line: no checkpoint, a model that is no decoder, has no dense
    feed-forward networks or experts already, a tensor that is missing, left over or of another shape.
    """
    folder, name, revision = locate(src)
    said = read_config(folder)
    model_type = said.get("model_type")
    if model_type in OURS:
        raise ValueError(f"{name} is an hf_moe checkpoint already.")
    own = is_own(said)
    if trust_remote_code and not own:
        raise ValueError(
            f"trust_remote_code (--trust-remote-code) has no effect: {name} is a {model_type}, which brings no code "
            "that Transformers would need."
        )
    if model_type not in CONFIG_MAPPING and not own:
        raise ValueError(
            f"{name} has model_type {model_type!r}, which Transformers {transformers.__version__} does not know: take "
            "a newer one."
        )
    if said.get("quantization_config") is not None:
        raise ValueError(f"{name} is quantized: experts are grafted onto weights in 16 or 32 bits, save those first.")
    code, config = own_code(folder), config_of(folder, trust_remote_code)
    check_decoder(name, config)
    check_generation_config(folder)
    mend(config.get_text_config(decoder=True), name)
    model = empty(config)
    if needed := required(model):
        raise ValueError(
            f"{name} is a {model_type}, which reads no text without {needed}: experts can be grafted onto models that "
            f"do.{text_alone(config)}"
        )
    if find_routers(model):
        raise ValueError(
            f"{name} is a {model_type}, already a mixture of experts: train it as it is, or import it where hf_moe "
            "has a table."
        )
    networks = find_feed_forwards(model)
    if not networks:
        raise ValueError(
            f"No layer of {name} ({model_type}) has a dense feed-forward network: experts stand for one."
            f"{text_alone(config)}"
        )
    checkpoint = Checkpoint(folder)
    found, conversions = names_in_memory(model, checkpoint.entries)
    if conversions:
        checkpoint = ConvertedCheckpoint(folder, found, conversions)
        found = {name: name for name in checkpoint.entries}
    ignored = [] if own else unread_keys(said, config)  # such a class need not say what it reads
    names = agreed_names(model, networks, checkpoint, {new: stored for stored, new in found.items()})
    return GraftSource(name, revision, config, model, checkpoint, names, networks, ignored, code)


def check_decoder(name: str, config: PreTrainedConfig) -> None:
    """Raise ValueError unless this is a decoder that writes text, or one with pictures beside the text."""
    parts = (config, config.get_text_config(decoder=True))
    encodes = any(part.is_encoder_decoder or part.model_type in ENCODER_DECODERS for part in parts)
    hosts = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if has_parts(config) else MODEL_FOR_CAUSAL_LM_MAPPING
    if encodes or type(config) not in hosts or not hasattr(parts[1], "vocab_size"):
        raise ValueError(
            f"{name} is a {config.model_type}, no decoder that writes text, nor one that also reads pictures: experts "
            f"can be grafted onto those.{text_alone(config)}"
        )


def required(model: PreTrainedModel) -> str | None:
    """What a forward must be given beside its tokens, None where that is nothing."""
    given = inspect.signature(type(model).forward).parameters.values()
    needed = [x.name for x in given if x.default is x.empty and x.kind is x.POSITIONAL_OR_KEYWORD]
    return next((name for name in needed if name not in ("self", "input_ids")), None)


def text_alone(config: PreTrainedConfig) -> str:
    """Of a model of several parts, what can be done with the one that writes."""
    text = config.get_text_config(decoder=True)
    if text is config or text.is_encoder_decoder or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return ""
    return f" Its language model ({text.model_type}) may be taken alone: save it by itself, and give that."


def agreed_names(
    model: PreTrainedModel, networks: Mapping[int, FeedForward], checkpoint: Checkpoint, stored: dict[str, str]
) -> dict[str, str]:
    """Of each parameter that is stored, the name in the files; ValueError for what is missing, odd or left over."""
    state, tied, kind = model.state_dict(), model.all_tied_weights_keys, model.config.model_type
    ignored = [BUFFERS, *(model._keys_to_ignore_on_load_unexpected or ())]
    names = {}
    for name in stored_names(model):
        # A tied pair may be stored under the other's name.
        other = next((first for first, second in tied.items() if second == name and first in stored), name)
        if name not in stored and other not in stored:
            raise ValueError(f"The checkpoint lacks {name}, which a {kind} with its config calls for.")
        names[name] = stored[name if name in stored else other]
        entry = checkpoint.entries[names[name]]
        if entry.shape != tuple(state[name].shape):
            raise ValueError(
                f"{names[name]} has shape {list(entry.shape)}, but the config calls for {list(state[name].shape)}."
            )
    for name, there in stored.items():
        if name in names or any(re.search(pattern, name) for pattern in ignored):
            continue
        if name not in tied:
            raise ValueError(f"The checkpoint holds {there}, which a {kind} with this config does not use.")
        if not torch.equal(checkpoint.tensor(there), checkpoint.tensor(names[tied[name]])):
            raise ValueError(f"{there} differs from {names[tied[name]]} although the config says they are shared.")
    for network in networks.values():
        for tensor in network.tensors:
            entry = checkpoint.entries[names[f"{network.path}.{tensor}"]]
            if entry.dtype not in WEIGHT_DTYPES:
                raise ValueError(f"{network.path}.{tensor} is {entry.dtype}: hf_moe reads floats only.")
    return names
