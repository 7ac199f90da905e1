"""What a model costs: parameters, arithmetic, cache and memory, read off a model without weights."""

from collections.abc import Iterator
from copy import deepcopy

import torch

from ..model.configuration_hf_moe import HfMoeConfig
from ..model.configuration_hf_moe_graft import HfMoeGraftConfig
from ..model.modeling_hf_moe import HfMoeForCausalLM
from ..model.modeling_hf_moe_graft import HfMoeGraftForCausalLM
from ..reading import positions
from .forward import counted

# hf_moe's configs and the classes that they are of.
OURS = {HfMoeConfig: HfMoeForCausalLM, HfMoeGraftConfig: HfMoeGraftForCausalLM}
BYTES = {"float32": 4, "bfloat16": 2, "float8": 1}
CACHE_DTYPE = "bfloat16"
CONTEXT = 4096


def sizes(config: HfMoeConfig | HfMoeGraftConfig, context: int | None = None, experts: float | None = None) -> dict:
    """Sizes of HfMoeForCausalLM(config), as a dict that can be written as JSON; of a graft, see `graft_sizes`.

    total_params; active_params, those that work on one token: K of the E routed experts in each sparse layer and all
    that is not a routed expert, input embedding and head included. Of these, embedding_params and head_params; where
    the two are one tensor, it counts as the head, which computes, and embedding_params is 0. Modules for multi-token
    prediction are in the total alone: plain decoding does not run them.

    flops_per_token, forward, at a context of `context` tokens (default: 4096, or max_position_embeddings if that is
    less): 2 for each active parameter that multiplies, and in each layer 2 H (d_qk + d_v) for each token attended to.
    As in PaLM (https://arxiv.org/abs/2204.02311, appendix B), a token is taken to attend to all `context` tokens, or
    to all within its window. Latent attention is counted with its keys and values expanded.
    training_flops_per_token is three times that: the backward pass costs twice the forward. Of these,
    non_embedding_training_flops_per_token are those of the layers alone: the M of DeepSeek LLM's scaling laws.

    kv_cache_bytes_per_token, in bfloat16, and kv_cache_bytes_per_token_by_dtype; beyond the window a token adds only
    kv_cache_bytes_per_token_beyond_window. weight_bytes by dtype.

    experts: K as it was measured, where a router gives tokens different numbers of experts.
    """
    if isinstance(config, HfMoeGraftConfig):
        return graft_sizes(config, context, experts)
    context = context or min(CONTEXT, config.max_position_embeddings)
    with torch.device("meta"):
        model = HfMoeForCausalLM(config)
    parameters = dict(model.named_parameters())
    active = {name: active_part(name, parameter, config, experts) for name, parameter in parameters.items()}
    embedding = model.get_input_embeddings().weight.numel()
    tied = config.tie_word_embeddings
    total = sum(parameter.numel() for parameter in parameters.values())
    # Weights multiply; norms are vectors, and so are biases, though the experts' are stored as rows of a matrix.
    multiplying = sum(active[name] for name, p in parameters.items() if p.dim() > 1 and not name.endswith("bias"))
    flops = 2 * (multiplying - (0 if tied else embedding)) + sum(attention_flops(config, context))
    cached = sum(cached_elements(config) for _ in config.layer_types)
    kept = sum(cached_elements(config) for kind in config.layer_types if kind == "full_attention")
    return {
        "total_params": total,
        "active_params": sum(active.values()),
        "embedding_params": 0 if tied else embedding,
        "head_params": embedding,
        "context": context,
        "flops_per_token": flops,
        "training_flops_per_token": 3 * flops,
        "non_embedding_training_flops_per_token": 3 * (flops - 2 * embedding),
        "kv_cache_bytes_per_token": cached * BYTES[CACHE_DTYPE],
        "kv_cache_bytes_per_token_beyond_window": kept * BYTES[CACHE_DTYPE],
        "kv_cache_bytes_per_token_by_dtype": {dtype: cached * size for dtype, size in BYTES.items()},
        "weight_bytes": {dtype: total * size for dtype, size in BYTES.items()},
    }


def graft_sizes(config: HfMoeGraftConfig, context: int | None = None, experts: float | None = None) -> dict:
    """Sizes of HfMoeGraftForCausalLM(config), by what its host's own code does in a forward of `context` tokens.

    As `sizes`, but the FLOPs are those of all matrix products that are made, windows or not, without what state spaces
    compute element by element. The cache in bfloat16: kv_cache_bytes_per_token, kv_cache_bytes_fixed, whatever the
    number of tokens, and kv_cache_bytes_at_context. None for what is not known: all of it where the data decide
    about sizes, the cache where the host keeps it elsewhere than in a cache of Transformers.
    """
    context = context or positions(config, CONTEXT)
    with torch.device("meta"):
        model = HfMoeGraftForCausalLM(deepcopy(config)).to(torch.bfloat16)  # which is told how to compute
    said = graft_params(model, experts)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    flops, cached = counted(model, context) or (None, None)
    by_token = None if flops is None else flops // context
    return {
        **said,
        "embedding_params": 0 if head is embedding else embedding.numel(),
        "head_params": head.numel(),
        "context": context,
        "flops_per_token": by_token,
        "training_flops_per_token": by_token and 3 * by_token,
        "non_embedding_training_flops_per_token": by_token and 3 * (by_token - 2 * head.numel()),
        "kv_cache_bytes_per_token": cached and cached.per_token,
        "kv_cache_bytes_fixed": cached and cached.fixed,
        "kv_cache_bytes_at_context": cached and cached.at_context,
        "weight_bytes": {dtype: said["total_params"] * size for dtype, size in BYTES.items()},
    }


def graft_params(model: HfMoeGraftForCausalLM, experts: float | None = None) -> dict[str, int]:
    """total_params and active_params."""
    counts = {name: (x.numel(), active_part(name, x, model.config, experts)) for name, x in model.named_parameters()}
    total, active = map(sum, zip(*counts.values(), strict=True))
    return {"total_params": total, "active_params": active}


def active_part(
    name: str, parameter: torch.Tensor, config: HfMoeConfig | HfMoeGraftConfig, experts: float | None = None
) -> int:
    """How many of a parameter's elements work on one token."""
    if ".mtp_layers." in name:
        return 0
    module, _, own = name.rpartition(".")
    if not module.endswith(".experts") and not own.endswith("_experts"):  # the latter: a mixture of attention heads
        return parameter.numel()
    assert parameter.shape[0] == config.num_experts, f"{name} {tuple(parameter.shape)}"
    return round(parameter[0].numel() * (experts_per_token(config) if experts is None else experts))


def expert_flops(config: HfMoeConfig, of: str = "") -> int:
    """Forward FLOPs of a token in the routed experts of the layers; only those of weights `of` that name."""
    with torch.device("meta"):
        parameters = HfMoeForCausalLM(config).named_parameters()
    matrices = [(name, x) for name, x in parameters if f".mlp.experts.{of}" in name and not name.endswith("bias")]
    return 2 * sum(active_part(name, x, config) for name, x in matrices)


def experts_per_token(config: HfMoeConfig | HfMoeGraftConfig) -> int:
    return config.num_experts if config.router_type == "dense" else config.num_experts_per_tok


def attention_flops(config: HfMoeConfig, context: int) -> Iterator[int]:
    """For each layer, the products of one query with the keys it may see, and of its probabilities with the values."""
    if config.attention_type == "mla":
        per_key = config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim
    else:
        per_key = 2 * config.head_dim
    windows = {"sliding_attention": config.sliding_window, "chunked_attention": config.attention_chunk_size}
    for kind in config.layer_types:
        seen = min(context, windows.get(kind, context))
        yield 2 * config.num_attention_heads * per_key * seen


def cached_elements(config: HfMoeConfig) -> int:
    """Numbers that one layer keeps of one token: keys and values, or the latent and its RoPE key."""
    if config.attention_type == "mla":
        return config.kv_lora_rank + config.qk_rope_head_dim
    return 2 * config.num_key_value_heads * config.head_dim


def cache_alternatives(config: HfMoeConfig) -> dict[str, int]:
    """The same model's kv_cache_bytes_per_token with MHA, GQA and MQA.

    GQA has as many key-value heads as divide the heads, at most the usual 8; none where only 1 does. A head's size in
    latent attention is d_h = qk_nope_head_dim (DeepSeek-V2, table 1).
    """
    head_dim = config.qk_nope_head_dim if config.attention_type == "mla" else config.head_dim
    whole = config.num_attention_heads
    groups = [count for count in range(2, min(8, whole - 1) + 1) if whole % count == 0][-1:]
    heads = {"MHA": whole, **{f"GQA, {count} key-value heads": count for count in groups}, "MQA": 1}
    layers = config.num_hidden_layers
    return {name: layers * 2 * count * head_dim * BYTES[CACHE_DTYPE] for name, count in heads.items()}
