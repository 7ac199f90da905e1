"""DeepSeek-V2 and V2-Lite: arXiv 2405.04434. Latent attention, shared experts, device-limited routing."""

from typing import Any

from transformers import PreTrainedConfig

from ...model.configuration_hf_moe import HfMoeConfig
from .deepseek_rows import DEEPSEEK_FIELDS, LATENT_ATTENTION, groups
from .family import Computed, Family, same
from .moe_rows import LAYOUTS

LIMITED = {"greedy": False, "group_limited_greedy": True}  # topk_method: whether groups count


def limited(config: PreTrainedConfig) -> bool:
    if config.topk_method not in LIMITED:
        raise ValueError(
            f"deepseek_v2 field topk_method={config.topk_method!r} cannot be carried; only {', '.join(LIMITED)} can."
        )
    return LIMITED[config.topk_method]


def topk_method(config: HfMoeConfig) -> dict[str, Any]:
    return {"topk_method": "group_limited_greedy" if config.topk_group < config.n_group else "greedy"}


DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    fields={
        **DEEPSEEK_FIELDS,
        **LATENT_ATTENTION,
        **same("routed_scaling_factor", "output_router_logits"),
        "n_group": Computed(("n_group",), lambda config: config.n_group or 1 if limited(config) else 1, groups),
        "topk_group": Computed(("topk_group",), lambda config: config.topk_group or 1 if limited(config) else 1),
        "router_args": Computed(
            ("topk_method",), lambda config: {"group_score": "best"} if limited(config) else {}, topk_method
        ),
    },
    constants={"attention_type": "mla", "rope_interleave": True, "router_type": "softmax_topk"},
    # Transformers' class computes the same whatever the last three are; the code of the release does not.
    required={"mlp_bias": False, "norm_topk_prob": False, "scoring_func": "softmax", "moe_layer_freq": 1},
    # How training was spread; sizes that follow from others.
    neutral=frozenset({"pretraining_tp", "ep_size", "head_dim", "qk_head_dim"}),
    undeclared=frozenset({"scoring_func", "moe_layer_freq", "ep_size", "qk_head_dim", "aux_loss_alpha", "seq_aux"}),
    layouts=LAYOUTS,
)
