"""Solar Open: https://huggingface.co/upstage/Solar-Open-100B. GLM-4.5's routing in every layer."""

from .deepseek_rows import BIASED_SIGMOID, GROUPS, SHARED_EXPERTS_FIELDS
from .family import DECODER_FIELDS, Family, same
from .moe_rows import LAYOUTS

# There is no dense layer, whose width the one and whose number the other would be.
CARRIED = {
    name: source
    for name, source in {**DECODER_FIELDS, **SHARED_EXPERTS_FIELDS}.items()
    if name not in ("intermediate_size", "mlp_layer_types")
}

SOLAR_OPEN = Family(
    model_type="solar_open",
    fields={
        **CARRIED,
        **GROUPS,
        **same("head_dim", "routed_scaling_factor", "output_router_logits", "norm_topk_prob"),
    },
    constants=BIASED_SIGMOID,
    # Transformers' class computes the same whatever these are; that of GLM-4.5, which the release follows, does not.
    required={"first_k_dense_replace": 0, "use_qk_norm": False},
    undeclared=frozenset({"partial_rotary_factor", "first_k_dense_replace", "use_qk_norm"}),
    layouts=LAYOUTS,
)
