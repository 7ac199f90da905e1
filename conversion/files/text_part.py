"""The language model within a checkpoint of a model that sees pictures, too: its config and its tensors."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from .checkpoint import Checkpoint


class TextPart(NamedTuple):
    """The family of a language model, and which fields of its config the model around it does not read.

    alone: whether Transformers loads the language model from the whole's files.
    """

    family: str
    unread: tuple[str, ...] = ()
    alone: bool = True


# By the model_type of the whole.
TEXT_PARTS = {
    "gemma3": TextPart("gemma3_text", unread=("final_logit_softcapping",)),
    "llama4": TextPart("llama4_text"),
    "aria": TextPart("aria_text", alone=False),
    "qwen3_vl_moe": TextPart("qwen3_vl_moe_text", alone=False),
}

# As the Hub has it, and as Transformers 5 has it in memory.
LANGUAGE_MODEL = re.compile(r"(?:model\.)?language_model\.(?:model\.)?")
OTHER_PARTS = re.compile(r"(?:model\.)?(?:vision_tower|vision_model|visual|multi_modal_projector)\..+")


class TextCheckpoint(Checkpoint):
    """The language model's tensors, under the names that they have in a checkpoint of it alone."""

    def __init__(self, folder: Path, quantization: dict[str, Any] | None, alone: bool):
        if quantization is not None:
            raise ValueError(f"{folder.name} is quantized, which hf_moe reads in checkpoints of language models only.")
        super().__init__(folder)
        names = {name: text_name(name) for name in self.entries if not OTHER_PARTS.fullmatch(name)}
        if len(set(names.values())) < len(names):
            raise ValueError(f"{folder} holds tensors of its language model twice, under the names of two layouts.")
        self.alone = alone
        self.entries = {ours: self.entries[name] for name, ours in names.items()}
        self.file_of = {ours: self.file_of[name] for name, ours in names.items()}


def text_name(name: str) -> str:
    found = LANGUAGE_MODEL.match(name)
    if found is None:
        return name
    rest = name[found.end() :]
    return rest if rest.startswith("lm_head.") else f"model.{rest}"


def text_config(config: PreTrainedConfig, said: dict[str, Any]) -> PreTrainedConfig:
    """The language model's part of `config`, with what the whole decides; `said` is its config.json."""
    part = config.text_config
    for name in TEXT_PARTS[config.model_type].unread:
        if getattr(part, name) is not None:
            raise ValueError(
                f"{config.model_type} field text_config.{name}={getattr(part, name)!r} cannot be carried: "
                f"Transformers' {config.model_type} does not read it."
            )
    part.tie_word_embeddings = config.tie_word_embeddings
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(part, name, said.get(name, getattr(part, name)))
    return part
