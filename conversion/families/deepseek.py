"""DeepSeekMoE-16B, the first DeepSeek MoE: arXiv 2401.06066. Shared experts beside fine-grained routed ones.

Transformers has no class for it: its config comes with the checkpoint, as code that hf_moe does not run.
"""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from .deepseek_rows import DEEPSEEK_FIELDS, mlp_layer_types
from .family import Computed, Family
from .moe_rows import LAYOUTS, shared_width


@strict
class DeepseekConfig(PreTrainedConfig):
    """The fields of a DeepSeekMoE-16B config.json, with the defaults of the code that it was released with."""

    model_type = "deepseek"

    vocab_size: int = 102400
    hidden_size: int = 4096
    intermediate_size: int = 11008
    moe_intermediate_size: int = 1407
    num_hidden_layers: int = 30
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    n_shared_experts: int | None = None
    n_routed_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 0
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    aux_loss_alpha: float | int = 0.001
    seq_aux: bool = True
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 100000
    eos_token_id: int | list[int] | None = 100001
    pretraining_tp: int = 1
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0

    def __post_init__(self, **kwargs):
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**kwargs)


DEEPSEEK = Family(
    model_type="deepseek",
    fields={
        **DEEPSEEK_FIELDS,
        "n_shared_experts": Computed(
            ("n_shared_experts",),
            lambda config: config.n_shared_experts or 0,
            lambda config: {"n_shared_experts": shared_width(config) // config.moe_intermediate_size or None},
        ),
        "mlp_layer_types": Computed(
            ("first_k_dense_replace", "moe_layer_freq"), mlp_layer_types, DEEPSEEK_FIELDS["mlp_layer_types"].inverse
        ),
        # The released code leaves the weight of a single expert as it is.
        "norm_topk_prob": Computed(
            ("norm_topk_prob",),
            lambda config: config.norm_topk_prob and config.num_experts_per_tok > 1,
            lambda config: {"norm_topk_prob": config.norm_topk_prob},
        ),
    },
    constants={"router_type": "softmax_topk"},
    required={"scoring_func": "softmax"},
    neutral=frozenset({"pretraining_tp"}),  # how the training was spread; the model computes the same
    layouts={"per-expert": LAYOUTS["per-expert"]},
    own_config=(DeepseekConfig, "DeepseekForCausalLM"),
)
