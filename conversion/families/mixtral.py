"""Mixtral: arXiv 2401.04088. Softmax over the chosen experts; the sliding window, if any, holds in every layer."""

from .family import DECODER_FIELDS, Family, same
from .moe_rows import BLOCK_SPARSE, ROUTING_FIELDS

MIXTRAL = Family(
    model_type="mixtral",
    fields={
        **DECODER_FIELDS,
        **ROUTING_FIELDS,
        **same("head_dim", "sliding_window"),
        "num_experts": "num_local_experts",
        "moe_intermediate_size": "intermediate_size",
    },
    constants={"router_type": "topk_softmax"},
    required={"router_jitter_noise": 0.0},  # noise on the whole block's input; hf_moe has the router's only
    layouts={"per-expert": BLOCK_SPARSE, "fused": {}},
)
