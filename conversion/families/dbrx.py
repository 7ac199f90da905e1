"""DBRX: https://github.com/databricks/dbrx. LayerNorm; q, k and v in one matrix, experts one under the other."""

from typing import Any

from transformers import PreTrainedConfig

from ...model.configuration_hf_moe import HfMoeConfig
from .family import COMMON_NEUTRAL, Computed, Family, plain_rope, same
from .regions import Stacked

# What is known of each part of the config, and its bookkeeping.
KNOWN = {
    "attn_config": {"attn_pdrop", "clip_qkv", "kv_n_heads", "rope_theta"},
    "ffn_config": {"hidden_size", "ffn_act_fn", "ffn_hidden_size", "moe_num_experts", "moe_top_k", "moe_jitter_eps"}
    | {"moe_loss_weight", "moe_normalize_expert_weights"},
}
BOOKKEEPING = COMMON_NEUTRAL | {
    "model_type",
    "_name_or_path",
    "torch_dtype",
    "output_attentions",
    "is_encoder_decoder",
}
CLIP = 8.0  # there must be one; this is the release's
THETA = 10000.0  # of RoPE, where Transformers is told nothing


def part(config: PreTrainedConfig, name: str) -> PreTrainedConfig:
    """`attn_config` or `ffn_config`. Raises a ValueError that names a field in it which hf_moe does not know."""
    found = getattr(config, name)
    default = type(found)()
    for field, value in vars(found).items():
        if field.startswith("_") or field in KNOWN[name] | BOOKKEEPING or value == getattr(default, field, None):
            continue
        raise ValueError(f"dbrx field {name}.{field}={value!r} cannot be carried: hf_moe does not know it.")
    return found


def attention(name: str) -> Computed:
    return Computed(("attn_config",), lambda config: getattr(part(config, "attn_config"), name))


def ffn(name: str) -> Computed:
    return Computed(("ffn_config",), lambda config: getattr(part(config, "ffn_config"), name))


def attn_config(config: HfMoeConfig) -> dict[str, Any]:
    said = {"attn_pdrop": config.attention_dropout, "clip_qkv": config.clip_qkv or CLIP}
    theta = (config.rope_parameters or {}).get("rope_theta", THETA)
    return {"attn_config": said | {"kv_n_heads": config.num_key_value_heads, "rope_theta": theta}}


def clip(config: PreTrainedConfig) -> float:
    said = part(config, "attn_config").clip_qkv
    if said is None:
        raise ValueError("dbrx field attn_config.clip_qkv=None cannot be carried: its class always clips.")
    return said


def ffn_config(config: HfMoeConfig) -> dict[str, Any]:
    said = {
        "ffn_act_fn": {"name": config.hidden_act},
        "ffn_hidden_size": config.moe_intermediate_size,
        "moe_num_experts": config.num_experts,
        "moe_top_k": config.num_experts_per_tok,
        "moe_jitter_eps": config.router_args.get("jitter") or None,
        "moe_loss_weight": float(config.router_aux_loss_coef / config.num_experts_per_tok),
        "moe_normalize_expert_weights": 1.0 if config.norm_topk_prob else None,
    }
    return {"ffn_config": said}


def activation(config: PreTrainedConfig) -> str:
    said = part(config, "ffn_config").ffn_act_fn
    if set(said) != {"name"}:
        raise ValueError(f"dbrx field ffn_config.ffn_act_fn={said!r} cannot be carried; only a name can.")
    return said["name"]


def normalized(config: PreTrainedConfig) -> bool:
    order = part(config, "ffn_config").moe_normalize_expert_weights
    if order not in (None, 1):
        raise ValueError(
            f"dbrx field ffn_config.moe_normalize_expert_weights={order!r} cannot be carried; only 1.0 and None can."
        )
    return order == 1


def router_args(config: PreTrainedConfig) -> dict[str, Any]:
    jitter = part(config, "ffn_config").moe_jitter_eps
    return {"jitter": jitter} if jitter else {}


def rope(config: PreTrainedConfig) -> dict[str, Any]:
    """The release says theta in attn_config only, where Transformers 5 no longer looks: what is said there holds."""
    said, theta = plain_rope(config), getattr(config.attn_config, "rope_theta", None)
    if theta is None or theta == said["rope_theta"]:
        return said
    if said != {"rope_type": "default", "rope_theta": THETA}:
        raise ValueError(
            f"dbrx field attn_config.rope_theta={theta!r} cannot be carried: rope_parameters says {said!r}."
        )
    return said | {"rope_theta": float(theta)}


_OURS, _BLOCK = "model.layers.{layer}.", "transformer.blocks.{layer}."
_NORM, _EXPERTS = f"{_BLOCK}norm_attn_norm.", f"{_BLOCK}ffn.experts.mlp."

DBRX = Family(
    model_type="dbrx",
    fields={
        **same("vocab_size", "initializer_range", "use_cache", "output_router_logits", "tie_word_embeddings"),
        **same("pad_token_id", "bos_token_id", "eos_token_id"),
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "max_position_embeddings": "max_seq_len",
        "rope_parameters": Computed(
            ("rope_parameters", "attn_config"), rope, lambda config: {"rope_parameters": config.rope_parameters}
        ),
        "num_key_value_heads": attention("kv_n_heads")._replace(inverse=attn_config),
        "attention_dropout": attention("attn_pdrop"),
        "clip_qkv": Computed(("attn_config",), clip),
        "hidden_act": Computed(("ffn_config",), activation, ffn_config),
        "intermediate_size": ffn("ffn_hidden_size"),
        "moe_intermediate_size": ffn("ffn_hidden_size"),
        "num_experts": ffn("moe_num_experts"),
        "num_experts_per_tok": ffn("moe_top_k"),
        "norm_topk_prob": Computed(("ffn_config",), normalized),
        "router_args": Computed(("ffn_config",), router_args),
        "router_aux_loss_coef": Computed(
            ("ffn_config",),
            lambda config: config.ffn_config.moe_loss_weight * config.ffn_config.moe_top_k,
        ),
    },
    constants={"norm_type": "layer_norm", "rms_norm_eps": 1e-5, "router_type": "softmax_topk"},
    required={"resid_pdrop": 0.0, "emb_pdrop": 0.0, "head_dim": None},
    undeclared=frozenset({"head_dim"}),
    theta_elsewhere=True,
    tensors={
        "model.embed_tokens.weight": ("transformer.wte.weight",),
        "model.norm.weight": ("transformer.norm_f.weight",),
        f"{_OURS}input_layernorm.weight": (f"{_NORM}norm_1.weight",),
        f"{_OURS}post_attention_layernorm.weight": (f"{_NORM}norm_2.weight",),
        **{f"{_OURS}self_attn.{x}_proj.weight": (f"{_NORM}attn.Wqkv.weight",) for x in "qkv"},
        f"{_OURS}self_attn.o_proj.weight": (f"{_NORM}attn.out_proj.weight",),
        f"{_OURS}mlp.gate.weight": (f"{_BLOCK}ffn.router.layer.weight",),
        f"{_OURS}mlp.experts.gate_up_proj": (
            Stacked(f"{_EXPERTS}w1", flat=True),
            Stacked(f"{_EXPERTS}v1", flat=True),
        ),
        f"{_OURS}mlp.experts.down_proj": (Stacked(f"{_EXPERTS}w2", transposed=True, flat=True),),
    },
)
