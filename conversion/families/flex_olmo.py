"""FlexOlmo: arXiv 2507.07024. OLMoE's experts in OLMo 2's blocks, whose norms are on the outputs."""

from .family import DECODER_FIELDS, Family, same
from .moe_rows import LAYOUTS, ROUTING_FIELDS
from .olmo2 import OLMO2

FLEX_OLMO = Family(
    model_type="flex_olmo",
    fields={
        **DECODER_FIELDS,
        **ROUTING_FIELDS,
        **same("head_dim", "attention_bias", "num_experts", "norm_topk_prob"),
        "attention_output_bias": "attention_bias",
        "moe_intermediate_size": "intermediate_size",
    },
    constants={**OLMO2.constants, "router_type": "softmax_topk"},
    undeclared=OLMO2.undeclared,
    layouts=LAYOUTS,
)
