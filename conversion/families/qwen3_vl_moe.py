"""Qwen3-VL-MoE, the language model: arXiv 2511.21631. On text alone Qwen3-MoE, with experts transposed.

Transformers has no class with a head for it, so it is exported as a Qwen3-MoE.
"""

from typing import Any

from transformers import PreTrainedConfig

from .family import Computed, Family, plain_rope
from .qwen3_moe import QWEN3_MOE
from .regions import Stacked

OF_ITS_CODE = {"norm_topk_prob": True, "sliding_window": None}  # whatever a config says
_EXPERTS = "model.layers.{layer}.mlp.experts."


def rope_of_text(config: PreTrainedConfig) -> dict[str, Any]:
    """Without how positions in pictures share a head: of text all of them are the token's."""
    return {name: value for name, value in plain_rope(config).items() if not name.startswith("mrope_")}


QWEN3_VL_MOE_TEXT = Family(
    model_type="qwen3_vl_moe_text",
    fields={
        **{name: source for name, source in QWEN3_MOE.fields.items() if name not in OF_ITS_CODE},
        "rope_parameters": Computed(("rope_parameters",), rope_of_text),
    },
    constants={**QWEN3_MOE.constants, "norm_topk_prob": True},
    required=OF_ITS_CODE,
    undeclared=frozenset(OF_ITS_CODE),
    layouts={
        "fused": {
            f"{_EXPERTS}gate_up_proj": (Stacked(f"{_EXPERTS}gate_up_proj", transposed=True),),
            f"{_EXPERTS}down_proj": (Stacked(f"{_EXPERTS}down_proj", transposed=True),),
        },
        "fused-v5": {},  # as Transformers 5 has them in memory
    },
)
