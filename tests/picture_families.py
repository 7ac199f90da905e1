"""Tiny models of families that read pictures and text, and a picture for each."""

import inspect

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from . import dense_families

SIDE, PATCH = 4, 4  # patches across a picture, pixels across a patch
IMAGE, BEGIN, END = 120, 121, 122  # tokens
TOKENS = {
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": 123,
    "audio_token_id": 124,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
    "boi_token_index": BEGIN,
    "boi_token_id": BEGIN,
    "eoi_token_index": END,
    "eoi_token_id": END,
    "pad_token_id": 0,
}
OTHERS = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "depth": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "image_size": SIDE * PATCH,
    "patch_size": PATCH,
    "out_hidden_size": 32,
    "projection_dim": 32,
    "num_position_embeddings": 16,
    "position_embedding_size": 16,
    "pooling_kernel_size": 2,
    "fullatt_block_indexes": [1],
    "window_size": SIDE * PATCH,
    "deepstack_visual_indexes": [0],
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
ALL_OF_A_HEAD = MROPE | {"partial_rotary_factor": 1.0}
LINEAR = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
# What the text of some needs.
TEXT = {
    "gemma4": {"per_layer_config": {}},
    **{name: {"rope_parameters": MROPE} for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "cosmos3_omni")},
    **{name: {"rope_parameters": ALL_OF_A_HEAD} for name in ("glm46v", "glm4v", "glm_ocr", "glmga", "hunyuan_vl")},
    "paddleocr_vl": {"rope_parameters": MROPE},
    "qwen3_5": {"rope_parameters": ALL_OF_A_HEAD, **LINEAR},
}
# What the whole of some is told.
WHOLE = {
    "gemma3": {"mm_tokens_per_image": 4},
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    "llava": {"vision_feature_layer": -1},
}


SPARSE, UNTRIED = "it has experts already", "not tried: it has no tiny model here"
DENSE_TOO = ("gemma4",)  # have experts or not, as the config says
# model_type -> why it is none that experts could be grafted onto, or is not known to be one.
LEFT_OUT = {
    **dict.fromkeys(("blip", "blip-2", "instructblip", "instructblipvideo"), "it reads no text without a picture"),
    **dict.fromkeys(("kosmos-2", "kosmos-2.5"), "its text's layers are within a model with a head of its own"),
    "shieldgemma2": "it says yes or no",
    "pi0": "it moves a robot",
    "evolla": "it reads proteins",
    "paligemma": "it reads its prompt in both directions, which a comparison with a cache takes for an error",
    **dict.fromkeys(("fast_vlm", "gemma3n", "perception_lm"), "not tried: timm reads its pictures"),
    **dict.fromkeys(("apertus1p5", "chameleon", "cosmos3_edge", "emu3", "granite4_vision"), UNTRIED),
    **dict.fromkeys(("idefics", "molmo2", "qwen2_5_omni_thinker"), UNTRIED),
}


def config_of(model_type: str, **changes) -> PreTrainedConfig:
    """`changes` are of the text."""
    kind = CONFIG_MAPPING[model_type]
    default = kind(**WHOLE.get(model_type, {}))
    text, parts = default.get_text_config(decoder=True), {}
    for name in kind.sub_configs:
        part = getattr(default, name)
        if part is text:
            part = dense_families.config_of(text.model_type, **TEXT.get(model_type, {}) | changes)
        elif part is not None:
            known = set(type(part).__dataclass_fields__)
            part = type(part)(**{name: value for name, value in OTHERS.items() if name in known})
        parts[name] = part
    known = set(kind.__dataclass_fields__)
    given = {name: value for name, value in TOKENS.items() if name in known} | WHOLE.get(model_type, {})
    return kind(**given | parts)


def tiny(model_type: str, **changes) -> PreTrainedModel:
    config = config_of(model_type, **changes)
    torch.manual_seed(0)
    model = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)](config).eval()
    for weight in model.parameters():
        if not weight.any():  # some begin as if there was no picture
            torch.nn.init.normal_(weight, std=0.1)
    return model


def why_not(model_type: str) -> str | None:
    """Why a family of the mapping is none that experts can be grafted onto; None where it is one."""
    known = dense_families.LEFT_OUT | LEFT_OUT
    if model_type in known:
        return known[model_type]
    kind = CONFIG_MAPPING[model_type]
    if kind.model_type != model_type:
        return f"the name of a checkpoint of {kind.model_type}"
    whole = kind()
    text = whole.get_text_config(decoder=True)
    if whole.is_encoder_decoder or text.is_encoder_decoder:
        return "an encoder-decoder"
    sparse = model_type not in DENSE_TOO and any("expert" in name for name in type(text).__dataclass_fields__)
    return SPARSE if sparse else None


FAMILIES = [name for name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if why_not(name) is None]


def picture() -> torch.Tensor:
    """[1, C, H, W]."""
    return torch.rand(1, 3, SIDE * PATCH, SIDE * PATCH, generator=torch.Generator().manual_seed(7))


def rows(times: int = 1) -> torch.Tensor:
    """The picture's patches, [patches, T C P P]."""
    patches = picture().unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # [1, C, h, w, P, P]
    return patches.permute(0, 2, 3, 1, 4, 5).reshape(SIDE * SIDE, -1).repeat(1, times)


def grid() -> dict[str, torch.Tensor]:
    return {"pixel_values": rows(times=2), "image_grid_thw": torch.tensor([[1, SIDE, SIDE]])}


def places() -> dict[str, torch.Tensor]:
    across = torch.arange(SIDE)
    where = torch.stack(torch.meshgrid(across, across, indexing="xy"), dim=-1).reshape(1, -1, 2)
    return {"pixel_values": rows()[None], "image_position_ids": where}


def sized() -> dict[str, torch.Tensor]:
    return {"pixel_values": picture(), "image_sizes": torch.tensor([[SIDE * PATCH, SIDE * PATCH]])}


# Family -> how it is given a picture, and how many tokens stand for that.
PICTURES = {
    "gemma3": (lambda: {"pixel_values": picture()}, 4),
    "gemma4": (places, 4),
    "idefics3": (lambda: {"pixel_values": picture()[None]}, 4),
    "llava": (lambda: {"pixel_values": picture()}, 16),
    "mistral3": (sized, 4),
    "qwen2_5_vl": (grid, 4),
    "qwen2_vl": (grid, 4),
    "qwen3_5": (grid, 4),
    "qwen3_vl": (grid, 4),
    "smolvlm": (lambda: {"pixel_values": picture()[None]}, 4),
}


def read(model_type: str) -> dict[str, torch.Tensor]:
    """A text about a picture, [1, S]."""
    given, count = PICTURES[model_type]
    ids = torch.tensor([[5, 9, BEGIN, *[IMAGE] * count, END, 17, 33, 6, 71]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given()}
    host = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[CONFIG_MAPPING[model_type]]
    kinds = {"token_type_ids", "mm_token_type_ids"} & inspect.signature(host.forward).parameters.keys()
    return inputs | {name: (ids == IMAGE).long() for name in kinds}  # what tells pictures from text
