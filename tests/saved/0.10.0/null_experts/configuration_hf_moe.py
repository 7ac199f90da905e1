"""Configuration of the hf_moe family: one flat set of fields for the whole mixture-of-experts design space."""

import os
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .parallel_plans import block_ep_plan, block_tp_plan, mlp_tp_plan, within
from .router_code import SAVED, HfMoeRouterCode
from .routing import ROUTERS, Range

# Which class answers to which Auto class when the files travel with a checkpoint.
AUTO_MAP = {
    "AutoConfig": "configuration_hf_moe.HfMoeConfig",
    "AutoModel": "modeling_hf_moe.HfMoeModel",
    "AutoModelForCausalLM": "modeling_hf_moe.HfMoeForCausalLM",
    "AutoModelForSequenceClassification": "modeling_hf_moe.HfMoeForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_hf_moe.HfMoeForTokenClassification",
    # `transformers serve` asks for this one first, and then only for classes of Transformers itself.
    "AutoModelForDecision": "modeling_hf_moe.HfMoeForCausalLM",
}

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "num_experts", "n_group"),
)
COEFFICIENTS = (
    *("router_aux_loss_coef", "router_z_loss_coef", "seq_aux_loss_coef", "device_aux_loss_coef"),
    *("comm_aux_loss_coef", "mtp_loss_coef", "router_bias_update_speed", "initializer_range", "rms_norm_eps"),
)
# Field -> the least that it may be; those of CAPS are above 0, or None.
LEAST = dict.fromkeys(SIZES, 1) | dict.fromkeys(
    ("n_shared_experts", "num_mtp_layers", "num_hash_layers", *COEFFICIENTS), 0
)
CAPS = ("clip_qkv", "attn_logit_softcapping", "final_logit_softcapping", "moe_latent_size")


@strict
class HfMoeConfig(HfMoeRouterCode, PreTrainedConfig):
    r"""Configuration of an [`HfMoeModel`]. Every field has one meaning, whatever the others are.

    Sizes
    :   vocab_size, hidden_size, intermediate_size (of dense MLPs), num_hidden_layers, max_position_embeddings.

    Blocks
    :   norm_type ("rms_norm", or "layer_norm" without a bias, as in DBRX; both with rms_norm_eps),
        rms_norm_unit_offset (multiply by 1 + weight, in float32, as in Gemma), layer_norm_placement ("pre": on the
        input of attention and MLP; "post": on their output, as in OLMo-2; "sandwich": on both, as in Gemma 2),
        sparse_output_norm (with "pre", one more on the output of sparse MLPs, as in A.X K1),
        embedding_multiplier (of the embeddings), residual_multiplier (of what attention and MLP add), logits_scaling
        (the logits are divided by it), as in Granite.

    Attention
    :   attention_type ("gqa", "mla" for latent attention, or "moa" for a mixture of heads), num_attention_heads,
        num_key_value_heads (equal: MHA; 1: MQA; between: GQA), head_dim (default hidden_size / num_attention_heads),
        attention_bias (on q, k and v), attention_output_bias (on o),
        attention_multiplier (of q k^T; default head_dim^-0.5; Gemma: query_pre_attn_scalar^-0.5),
        qk_norm ("head": a norm over each head, as in Qwen3; "head_after_rope": after RoPE instead of before, as in
        Hunyuan; "projection": over all heads at once, as in OLMoE; "l2": an RMSNorm without weight over each head
        after RoPE, on the layers that have it, as in Llama 4),
        clip_qkv (clamp q, k and v to +-clip_qkv), attn_logit_softcapping and final_logit_softcapping
        (x -> cap tanh(x / cap), Gemma 2), attention_sinks (a learned logit a head that takes part in the softmax and
        attends to nothing, as in gpt-oss), layer_types ("full_attention", "sliding_attention" or "chunked_attention"
        per layer; default: sliding everywhere if sliding_window is set, else full), sliding_window,
        attention_chunk_size (chunked: only within the own one of chunks of so many tokens, as in Llama 4),
        rope_parameters (any RoPE type of Transformers; "partial_rotary_factor" rotates only the first part of a head;
        or one such dict a layer type, as in Gemma 3), rope_interleave (RoPE pairs dimensions 2i and 2i + 1, as
        DeepSeek and GPT-J do, else i and i + d / 2), no_rope_layers (per layer 1 where it has RoPE and 0 where not, as
        in SmolLM3 and Llama 4; default: all have it), attn_temperature_tuning (queries of layers without RoPE are
        multiplied by 1 + attn_scale ln(1 + floor((position + 1) / floor_scale)), as in Llama 4).

    Latent attention (attention_type "mla", DeepSeek-V2)
    :   kv_lora_rank and q_lora_rank (ranks of the latents; q_lora_rank None: full-rank queries), qk_nope_head_dim and
        qk_rope_head_dim (the parts of a query or key without and with RoPE; head_dim is the latter), v_head_dim.
        attention_bias is that of q_a_proj and kv_a_proj_with_mqa.

    Mixture of attention heads (attention_type "moa", JetMoE)
    :   Of num_experts experts with num_key_value_heads query heads each a token uses num_experts_per_tok; the rest of
        the routing is that of the MLPs, too. num_attention_heads counts the query heads a token uses.

    Multi-token prediction (DeepSeek-V3)
    :   num_mtp_layers (modules of a causal language model, each a block like the last layer, that predict one more
        token ahead), mtp_loss_coef (weight of their loss in training; DeepSeek-V3: 0.3, later 0.1).

    MLPs and experts
    :   hidden_act, gated_mlp (down(act(gate(x)) * up(x)), else down(act(up(x)))), mlp_bias, mlp_layer_types ("dense"
        or "sparse" per layer; default: all sparse), num_experts (routed experts E), num_experts_per_tok (K),
        moe_intermediate_size (of one routed expert; default intermediate_size), n_shared_experts,
        shared_expert_intermediate_size (of one shared expert; default moe_intermediate_size), shared_expert_gate
        (multiply the shared experts' output by sigmoid(w x), as in Qwen2-MoE), experts_swiglu_limit and
        experts_swiglu_alpha (routed experts' activation (up + 1) * gate * sigmoid(alpha gate), both clamped to the
        limit, as in gpt-oss), expert_input_scaling (an expert's weight multiplies its input, as in Llama 4),
        moe_latent_size (the width of what routed experts read and write, between two projections that all tokens
        share, as in Nemotron 3; None: hidden_size).

    Routing
    :   router_type (a key of `routing.ROUTERS`), router_args (that router's own arguments, see `routing.py`),
        num_hash_layers (in the first so many layers a token's id says which experts, as in DeepSeek-V4),
        norm_topk_prob (weights of the K chosen experts sum to 1), routed_scaling_factor (multiplies them),
        n_group and topk_group (choose only within the best topk_group of n_group expert groups),
        expert_capacity_factor (in training an expert takes at most ceil(factor K T / E) tokens, the rest are dropped
        and their residual carries them; None drops nothing).

    Training
    :   router_aux_loss_coef (load-balance loss; 0 turns it off), device_aux_loss_coef and comm_aux_loss_coef (the same
        over n_group groups), seq_aux_loss_coef (within each sequence), router_z_loss_coef. Each multiplies the mean
        over the sparse layers of a loss that, but for z, is 1 at perfect balance, whatever K and the number of layers.
        Elsewhere the same training has other numbers: the loss of Mixtral, OLMoE or Qwen-MoE in Transformers is K at
        perfect balance, so its coefficient is K times larger here; Switch and DeepSeek add theirs once a sparse layer,
        so that it is as many times larger as there are sparse layers. Import, export and presets convert.
        router_bias_update_speed
        (of router_args["selection_bias"], moved by hf_moe's trainers once per optimizer step), output_router_logits
        (return router logits and `aux_loss` outside training too), attention_dropout, classifier_dropout (token
        classification), initializer_range.

    `router_code` names the file of a router that comes with its model, and is set when one is saved; `provenance`
    records where a converted checkpoint came from. Raises on construction where fields contradict each other, with the
    numbers.
    """

    model_type = "hf_moe"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # as hosts have called it; the Trainer adds to it
    attribute_map = {"num_local_experts": "num_experts", "n_routed_experts": "num_experts"}

    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5632
    num_hidden_layers: int = 16
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rms_norm_unit_offset: bool = False
    norm_type: Literal["rms_norm", "layer_norm"] = "rms_norm"
    layer_norm_placement: Literal["pre", "post", "sandwich"] = "pre"
    sparse_output_norm: bool = False
    embedding_multiplier: float | int = 1.0
    residual_multiplier: float | int = 1.0
    logits_scaling: float | int = 1.0
    tie_word_embeddings: bool = False

    attention_type: Literal["gqa", "mla", "moa"] = "gqa"
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_dropout: float | int = 0.0
    attention_multiplier: float | int | None = None
    attention_sinks: bool = False
    qk_norm: Literal["head", "head_after_rope", "projection", "l2"] | None = None
    clip_qkv: float | int | None = None
    attn_logit_softcapping: float | int | None = None
    final_logit_softcapping: float | int | None = None
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    attention_chunk_size: int | None = None
    rope_parameters: dict | None = None
    rope_interleave: bool = False
    no_rope_layers: list[int] | None = None
    attn_temperature_tuning: bool = False
    floor_scale: int = 8192
    attn_scale: float | int = 0.1
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int | None = None
    qk_rope_head_dim: int | None = None
    v_head_dim: int | None = None

    num_mtp_layers: int = 0
    mtp_loss_coef: float | int = 0.3

    hidden_act: str = "silu"
    gated_mlp: bool = True
    mlp_bias: bool = False
    mlp_layer_types: list[str] | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    n_shared_experts: int = 0
    shared_expert_intermediate_size: int | None = None
    shared_expert_gate: bool = False
    experts_swiglu_limit: float | int | None = None
    experts_swiglu_alpha: float | int = 1.702
    expert_input_scaling: bool = False
    moe_latent_size: int | None = None

    router_type: str = "softmax_topk"
    router_args: dict[str, Any] | None = None
    num_hash_layers: int = 0
    norm_topk_prob: bool = False
    routed_scaling_factor: float | int = 1.0
    n_group: int = 1
    topk_group: int = 1
    router_aux_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.0
    seq_aux_loss_coef: float | int = 0.0
    device_aux_loss_coef: float | int = 0.0
    comm_aux_loss_coef: float | int = 0.0
    router_bias_update_speed: float | int = 0.0
    expert_capacity_factor: float | int | None = None
    output_router_logits: bool = False
    router_code: str | None = None

    classifier_dropout: float | int = 0.1
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    provenance: dict[str, Any] | None = None

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            default = self.hidden_size // max(self.num_attention_heads, 1)
            self.head_dim = (self.qk_rope_head_dim or default) if self.attention_type == "mla" else default
        if self.moe_intermediate_size is None:
            self.moe_intermediate_size = self.intermediate_size
        if self.shared_expert_intermediate_size is None:
            self.shared_expert_intermediate_size = self.moe_intermediate_size
        if self.router_args is None:
            self.router_args = {}
        if self.layer_types is None:
            attention = "full_attention" if self.sliding_window is None else "sliding_attention"
            self.layer_types = [attention] * self.num_hidden_layers
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["sparse"] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    if TYPE_CHECKING:  # hf_moe adds it, whose presets do not travel with these files

        @staticmethod
        def from_preset(name: str, **changes: Any) -> "HfMoeConfig": ...

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "HfMoeConfig":
        """Itself, whatever a config.json says besides: an hf_moe model is no part of another."""
        return self

    @property
    def qk_head_dim(self) -> int | None:
        """Size of a query of latent attention; by it Transformers knows that keys and values differ in size."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.attention_type == "mla" else None

    @property
    def logit_scale(self) -> float:
        """What the logits are multiplied by, where vLLM looks for it."""
        return 1.0 / self.logits_scaling

    @property
    def expert_hidden_size(self) -> int:
        """The width of what routed experts read and write."""
        return self.hidden_size if self.moe_latent_size is None else self.moe_latent_size

    @property
    def swiglu_limit(self) -> float | None:
        """experts_swiglu_limit, where Transformers' FP8 experts look for it."""
        return self.experts_swiglu_limit

    @property
    def swiglu_alpha(self) -> float | None:
        """experts_swiglu_alpha, where the experts have a limit."""
        return None if self.experts_swiglu_limit is None else self.experts_swiglu_alpha

    @property
    def rope_by_layer_type(self) -> bool:
        """Whether rope_parameters hold one dict a layer type."""
        return bool(self.nested_rope_parameter_keys(self.rope_parameters))

    @property
    def limits_experts(self) -> bool:
        """Whether an expert takes a limited number of a forward's tokens outside training, too."""
        return self.router_args.get("eval_capacity_factor") is not None

    @property
    def ropes(self) -> list[dict[str, Any]]:
        """Each dict of rope_parameters, of which there is one for all layers or one a layer type."""
        return list(self.rope_parameters.values()) if self.rope_by_layer_type else [self.rope_parameters]

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Tensor parallelism: a style for each tensor that this configuration has (any other draws a warning)."""
        # A norm over all heads at once needs its whole input, so q, k and v are gathered from the ranks.
        gathered = self.qk_norm == "projection"
        column = "colwise_gather_output" if gathered else "colwise"
        if self.attention_type == "mla":  # heads are split; every rank computes the latents and caches them
            attention = {"q_proj" if self.q_lora_rank is None else "q_b_proj": "colwise", "kv_b_proj": "colwise"}
            attention |= {"kv_a_proj_with_mqa": "mla_kv_a_proj", "o_proj": "rowwise"}
        elif self.attention_type == "moa" or self.attention_sinks:  # every rank computes the attention
            attention = {}
        else:
            attention = {"q_proj": column, "k_proj": column, "v_proj": column}
            attention["o_proj"] = "rowwise_split_input" if gathered else "rowwise"

        plan = {f"layers.*.self_attn.{name}": style for name, style in attention.items()}
        if "dense" in self.mlp_layer_types:
            plan |= within("layers.*.mlp", mlp_tp_plan(self.gated_mlp))
        if "sparse" in self.mlp_layer_types:
            cut = not self.mlp_bias  # the ranks' sums would add an expert's bias once per rank: those stay whole
            plan |= within("layers.*.mlp", block_tp_plan(self.gated_mlp, cut, self.n_shared_experts > 0))
        return plan

    @property
    def base_model_ep_plan(self) -> dict[str, str]:
        """Expert parallelism: whole experts on each rank, tokens dispatched to them."""
        if "sparse" not in self.mlp_layer_types:
            return {}
        return within("layers.*.mlp", block_ep_plan(self.gated_mlp, self.mlp_bias))

    def validate_amounts(self) -> None:
        """The first by name, and so the first to run: the others divide by what it checks."""
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {least}.")
        for name in CAPS:
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be above 0, or None.")

    def validate_attention(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of num_key_value_heads "
                f"({self.num_key_value_heads})."
            )
        sizes = {"full_attention": None, "sliding_attention": "sliding_window"}
        sizes["chunked_attention"] = "attention_chunk_size"
        unknown = sorted(set(self.layer_types) - set(sizes))
        if unknown:
            raise ValueError(f"layer_types may hold {', '.join(sizes)}, but has {unknown}.")
        for layer_type in self.layer_types:
            size = sizes[layer_type]
            if size and not (getattr(self, size) or 0) > 0:
                raise ValueError(f"layer_types has {layer_type}, but {size} is {getattr(self, size)}.")
        if {"sliding_attention", "chunked_attention"} <= set(self.layer_types):
            raise ValueError(
                f"layer_types has sliding_attention ({self.sliding_window}) and chunked_attention "
                f"({self.attention_chunk_size}): Transformers' masks take one of them beside full_attention."
            )

    def validate_block(self) -> None:
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act {self.hidden_act!r} is unknown; Transformers has {', '.join(sorted(ACT2FN))}."
            )
        if self.norm_type == "layer_norm" and self.rms_norm_unit_offset:
            raise ValueError("rms_norm_unit_offset (True) needs norm_type 'rms_norm', not 'layer_norm'.")
        if self.sparse_output_norm and self.layer_norm_placement != "pre":
            raise ValueError(
                f"sparse_output_norm (True) needs layer_norm_placement 'pre', but {self.layer_norm_placement!r} has a "
                "norm on every output already: leave it out."
            )
        if self.logits_scaling == 0:
            raise ValueError("logits_scaling (0) divides the logits: leave it out, or give another number.")

    def validate_positions(self) -> None:
        if self.rope_by_layer_type:
            missing = sorted(t for t in set(self.layer_types) if not self.rope_parameters.get(t))
            if missing:
                raise ValueError(
                    f"rope_parameters has {sorted(self.rope_parameters)}, but layer_types has {missing[0]}, too; for "
                    "layers without RoPE there is no_rope_layers."
                )
        for rope_type in (rope["rope_type"] for rope in self.ropes if rope):
            if rope_type not in ("default", *ROPE_INIT_FUNCTIONS):
                known = ", ".join(("default", *sorted(ROPE_INIT_FUNCTIONS)))
                raise ValueError(f"rope_type {rope_type!r} is unknown; Transformers has {known}.")
        if self.no_rope_layers is not None:
            wrong = len(self.no_rope_layers) != self.num_hidden_layers or not set(self.no_rope_layers) <= {0, 1}
            if wrong:
                raise ValueError(
                    f"no_rope_layers ({self.no_rope_layers}) must hold 1 (RoPE) or 0 (none) for each of "
                    f"num_hidden_layers ({self.num_hidden_layers}) layers."
                )
        if self.attn_temperature_tuning and (self.no_rope_layers is None or 0 not in self.no_rope_layers):
            raise ValueError(
                f"attn_temperature_tuning (True) is for layers without RoPE, but no_rope_layers is "
                f"{self.no_rope_layers}."
            )
        if self.floor_scale <= 0:
            raise ValueError(f"floor_scale ({self.floor_scale}) must be above 0.")

    def validate_latent_attention(self) -> None:
        if self.attention_type != "mla":
            return
        sizes = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        optional = () if self.q_lora_rank is None else ("q_lora_rank",)
        for name in sizes + optional:
            if not (getattr(self, name) or 0) > 0:
                raise ValueError(f"attention_type 'mla' needs {name} of at least 1, but it is {getattr(self, name)}.")
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim ({self.qk_rope_head_dim}) must be even: RoPE turns pairs.")
        if self.head_dim != self.qk_rope_head_dim:
            raise ValueError(
                f"head_dim ({self.head_dim}) must be qk_rope_head_dim ({self.qk_rope_head_dim}) in latent attention; "
                "leave it out."
            )
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads ({self.num_key_value_heads}) must be num_attention_heads "
                f"({self.num_attention_heads}) in latent attention, whose latent serves every head; leave it out."
            )
        for name in ("qk_norm", "clip_qkv", "attention_multiplier", "attention_sinks", "no_rope_layers"):
            if getattr(self, name) not in (None, False):
                raise ValueError(f"{name} ({getattr(self, name)!r}) needs attention_type 'gqa', not 'mla'.")
        if self.rope_by_layer_type:
            raise ValueError(f"rope_parameters ({self.rope_parameters}) by layer type need attention_type 'gqa'.")

    def validate_mixture_of_heads(self) -> None:
        if self.attention_type != "moa":
            return
        active = "num_experts" if self.router_type == "dense" else "num_experts_per_tok"
        if self.num_attention_heads != self.num_key_value_heads * getattr(self, active):
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be num_key_value_heads "
                f"({self.num_key_value_heads}) times {active} ({getattr(self, active)}) with attention_type 'moa': "
                "the query heads that a token uses."
            )
        if self.router_type == "expert_choice" or not self.fills_slots:
            raise ValueError(
                f"router_type {self.router_type!r} gives a token any number of experts, attention_type 'moa' needs "
                f"{self.num_experts_per_tok} of them: use another router or attention_type 'gqa'."
            )
        for name in ("attention_bias", "qk_norm", "attention_sinks", "attn_temperature_tuning"):
            if getattr(self, name) not in (False, None, "head"):
                raise ValueError(f"{name} ({getattr(self, name)!r}) needs attention_type 'gqa', not 'moa'.")

    def validate_experts(self) -> None:
        if not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be between 1 and num_experts "
                f"({self.num_experts})."
            )
        if self.num_experts % self.n_group or not 1 <= self.topk_group <= self.n_group:
            raise ValueError(
                f"num_experts ({self.num_experts}) must be a multiple of n_group ({self.n_group}), and topk_group "
                f"({self.topk_group}) between 1 and n_group."
            )
        reachable = self.num_experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds the {reachable} experts in topk_group "
                f"({self.topk_group}) of n_group ({self.n_group}) groups of {self.num_experts // self.n_group}."
            )

        if self.experts_swiglu_limit is not None:
            if self.experts_swiglu_limit <= 0:
                raise ValueError(f"experts_swiglu_limit ({self.experts_swiglu_limit}) must be above 0, or None.")
            if not self.gated_mlp or self.hidden_act != "silu":
                raise ValueError(
                    f"experts_swiglu_limit ({self.experts_swiglu_limit}) needs gated_mlp and hidden_act 'silu', but "
                    f"they are {self.gated_mlp} and {self.hidden_act!r}."
                )

    def validate_hash_layers(self) -> None:
        able = sorted(name for name, router in ROUTERS.items() if router.may_hash)
        if self.num_hash_layers and self.router_type not in able:
            raise ValueError(
                f"num_hash_layers ({self.num_hash_layers}) needs a router that weighs any experts, {', '.join(able)}, "
                f"but router_type is {self.router_type!r}."
            )

    def validate_router(self) -> None:
        if self.router_code is not None and not SAVED.fullmatch(self.router_code):
            raise ValueError(f"router_code is {self.router_code!r}; it is the name of a file, plugin_NAME.py.")
        if self.needs_router_code:
            return
        if self.router_type not in ROUTERS:
            raise ValueError(f"router_type {self.router_type!r} is unknown; the routers are {sorted(ROUTERS)}.")
        known = ROUTERS[self.router_type].args
        unknown = sorted(set(self.router_args) - set(known))
        if unknown:
            raise ValueError(
                f"router_args {unknown} are unknown to {self.router_type!r}, which takes {sorted(known)}."
            )
        for name, value in self.router_args.items():
            if value not in known[name]:
                allowed = known[name] if isinstance(known[name], Range) else f"one of {list(known[name])}"
                raise ValueError(f"router_args[{name!r}] is {value!r}; it can be {allowed}.")
        if self.router_type == "gshard" and self.num_experts_per_tok != 2:
            raise ValueError(
                f"router_type 'gshard' sends a token to 2 experts, num_experts_per_tok is {self.num_experts_per_tok}."
            )
        if self.router_args.get("solver") == "auction" and self.num_experts_per_tok != 1:
            raise ValueError(
                f"solver 'auction' gives a token 1 expert, num_experts_per_tok is {self.num_experts_per_tok}."
            )
        if self.router_bias_update_speed and not self.router_args.get("selection_bias"):
            raise ValueError(
                f"router_bias_update_speed is {self.router_bias_update_speed}, but the router has no bias: set "
                'router_args={"selection_bias": True}.'
            )
        if self.expert_capacity_factor is not None and self.expert_capacity_factor <= 0:
            raise ValueError(
                f"expert_capacity_factor ({self.expert_capacity_factor}) must be above 0, or None to drop nothing."
            )

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        # A folder saved from a Hub checkpoint must not point back to that checkpoint's code.
        self.auto_map = dict(AUTO_MAP)
        self.name_router_code()
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
        self.save_router_code(save_directory)


__all__ = ["HfMoeConfig"]
