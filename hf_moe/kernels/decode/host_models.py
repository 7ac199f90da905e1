"""A decoding step with the kernels in Transformers' own models, and in grafts on them.

What a norm and an expert compute is tried on a few numbers, whatever its class. Attention, networks, blocks and layers
are those of `HOSTS`, a name a class: a class that is not there stays as it is, with its norms and experts by ours.

Shapes: B rows, T tokens of all of them, D hidden size, E experts, K experts per token.
"""

from contextlib import AbstractContextManager
from inspect import signature

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ...model.host import CACHE
from ...model.modeling_hf_moe_graft import HfMoeGraftedBlock
from ..formula import formula
from ..host_norms import KINDS, epsilon, kind_of, may_be_norm
from ..low_rank import given
from . import (
    METHODS,
    adapters,
    angles_forward,
    chooser,
    counters,
    experts,
    experts_network,
    few_tokens,
    fused,
    grouped,
    latent_forward,
    mlp_forward,
    network,
    norms,
    projected,
    recorded_layer,
    route_arguments,
    routed_rows,
    routers,
    summed_and_normed,
    tokens_read,
    turned_network,
    visible,
    weight_and_epsilon,
)

IS_NORM: dict[type, bool] = {}  # whether a class computes what the kernel for norms does; tried once


def norm_of(module: nn.Module) -> tuple[torch.Tensor, float] | None:
    """Weight and epsilon of a norm that the kernel computes: rounded before the weight, as Llama's."""
    kind = type(module)
    if kind not in IS_NORM:
        IS_NORM[kind] = may_be_norm(module) and kind_of(module) == KINDS[0]
    return (module.weight, epsilon(module)) if IS_NORM[kind] else None


def attention_forward(module: nn.Module, rows: int):
    """Of RoPE in halves over a whole head, with norms of each query and key, or of all of them at once, or without.

    A projection that has a bias, or does more, is called as it is.
    """
    further = hasattr(module, "sinks") or getattr(module.config, "clip_qkv", None) is not None
    if rows > experts.MAX_TOKENS or further:
        return None
    found = [norm_of(getattr(module, name)) for name in ("q_norm", "k_norm") if hasattr(module, name)]
    if not all(found):
        return None
    project, back = projected(rows, module.q_proj, module.k_proj, module.v_proj), projected(rows, module.o_proj)
    arrived = counters(module.q_proj.weight, rows * module.config.num_key_value_heads)
    original = type(module).forward

    def forward(hidden_states, position_embeddings, attention_mask=None, norm=None, **kwargs):
        cached = recorded_layer(kwargs.get(CACHE), module.layer_idx)
        cos, sin = position_embeddings
        if cached is None or cos.shape[-1] != module.head_dim:  # RoPE on a part of the head
            kwargs |= {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
            return original(module, hidden_states if norm is None else norm(hidden_states), **kwargs)
        out = grouped.grouped_attention(
            *project(hidden_states.flatten(0, 1), norm=norm and weight_and_epsilon(norm)),
            tuple(weight for weight, _ in found) or None,
            cos,
            sin,
            cached.keys,
            cached.values,
            cached.cumulative_length,
            visible(attention_mask),
            tokens_read(kwargs.get(CACHE)),
            arrived,
            scale=module.scaling,
            eps=found[0][1] if found else 0.0,
            interleaved=False,
        )
        count = (cached.cumulative_length, cos.shape[1])
        return back(out.flatten(1), counted=count)[0].view_as(hidden_states), None

    return forward


# What a router of Transformers computes, in the words of `routers.route`: the kind of scores, whether those of a
# token's experts are divided by their sum, a factor, whether logits are rounded, and the groups.
def softmax_router(gate: nn.Module):
    return "softmax_topk", gate.norm_topk_prob, 1.0, True, routers.ALL


def mixtral_router(gate: nn.Module):
    return "softmax_topk", True, 1.0, True, routers.ALL


def granite_router(gate: nn.Module):
    return "topk_softmax", False, 1.0, True, routers.ALL


def deepseek_v2_router(gate: nn.Module):
    limited = gate.topk_method == "group_limited_greedy"
    groups = routers.Groups(gate.num_group, gate.topk_group, 1) if limited else routers.ALL
    return "softmax_topk", False, gate.routed_scaling_factor, False, groups


def deepseek_v3_router(gate: nn.Module):
    groups = routers.Groups(gate.num_group, gate.topk_group, 2)
    return "sigmoid_topk", gate.norm_topk_prob, gate.routed_scaling_factor, False, groups


ROUTERS = {
    "OlmoeTopKRouter": softmax_router,
    "Qwen3MoeTopKRouter": softmax_router,
    "MixtralTopKRouter": mixtral_router,
    "Qwen2MoeTopKRouter": softmax_router,
    "MellumTopKRouter": softmax_router,
    "GraniteMoeTopKRouter": granite_router,
    "DeepseekV2TopkRouter": deepseek_v2_router,
    "DeepseekV3TopkRouter": deepseek_v3_router,
    "Glm4MoeLiteTopkRouter": deepseek_v3_router,
}


def host_arguments(gate: nn.Module):
    """What `routers.route` needs beside x; None where the router does more."""
    said = ROUTERS[type(gate).__name__](gate) if type(gate).__name__ in ROUTERS else None
    if said is None or gate.weight.numel() > 2**20:
        return None
    return gate.weight, getattr(gate, "e_score_correction_bias", None), gate.top_k, *said


SHARED = ("shared_experts", "shared_expert")  # what blocks call the network that every token takes


def routed_network(routed: nn.Module) -> experts.Network | None:
    """The weights of experts; None of those that the kernels for few tokens can't read."""
    if "has_gate" not in vars(routed) or routed.has_post_expert_norm:  # as it is an adapter that does more
        return None
    computed = formula(routed)
    if computed is None or (computed.interleaved and not computed.transposed):
        return None
    name = "gate_up_proj" if computed.gated else "up_proj"
    biases = (getattr(routed, f"{name}_bias"), routed.down_proj_bias) if routed.has_bias else None
    matrices = getattr(routed, name), routed.down_proj
    if computed.transposed:
        return turned_network(*matrices, computed.gated, computed.interleaved, biases)
    return experts_network(*matrices, computed.gated, biases)


def mixture_forward(module: nn.Module, rows: int, router: nn.Module, choose, arguments=None):
    """Of a block with `experts`, and with a shared network or without. The experts of x [T, D] are those that `choose`
    gives, or `routers.route` by its `arguments` in the place of the block's `router`.

    The shared network is in the experts' launches, unless it has a gate, or an activation of its own.
    """
    routed, found = adapters.of_experts(module.experts) or (module.experts, {})
    weights_of = routed_network(routed)
    many = found and rows > few_tokens.MAX_TOKENS
    compute = adapters.of_many(routed, found) if many else None
    if rows > experts.MAX_TOKENS or weights_of is None or (many and compute is None):
        return None
    computed, gate = formula(routed), getattr(module, "shared_expert_gate", None)
    shared = next((x for name in SHARED if (x := getattr(module, name, None)) is not None), None)
    apart = shared is None or gate is not None or computed.clamped or compute is not None
    beside = None if apart else network(shared, rows)
    beside = beside if beside is not None and experts.joined(weights_of, beside) else None
    alone = shared is not None and beside is None
    on_experts = (found.get("gate_up_proj" if computed.gated else "up_proj"), found.get("down_proj"))
    arrived = counters(weights_of.down.codes, rows)

    def forward(hidden_states: torch.Tensor, residual: torch.Tensor | None = None, norm=None) -> torch.Tensor:
        residual, x, weights, index = routed_rows(hidden_states, residual, norm, router, arguments, arrived, choose)
        if alone:
            added = shared(x) if gate is None else gate(x).sigmoid() * shared(x)
            residual = added if residual is None else added + residual.view_as(added)
        if compute is None:
            out = experts.mixture(x, weights, index, weights_of, beside, computed, residual, on_experts)
        else:
            out = compute(x, index, weights)
            out = out if residual is None else out + residual.view_as(out)
        return out.view_as(hidden_states)

    return forward


def experts_forward(module: nn.Module, rows: int):
    """Of experts alone, in a block that is not listed: its router and its shared network stay as they are."""
    weights_of = routed_network(module)
    if rows > experts.MAX_TOKENS or weights_of is None:
        return None
    computed, original = formula(module), type(module).forward

    def forward(*args, **kwargs) -> torch.Tensor:
        if is_parametrized(module) or given(module):  # by an adapter, while it computes
            return original(module, *args, **kwargs)
        x, index, weights = (value.contiguous() for value in (*args, *kwargs.values()))
        return experts.mixture(x, weights, index, weights_of, None, computed, None)

    return forward


def block_forward(module: nn.Module, rows: int):
    gate = module.gate if hasattr(module, "gate") else module.router
    arguments = host_arguments(gate)
    choose = (lambda x: gate(x)[1:3]) if arguments is None else (lambda x: routers.route(x, *arguments)[1:])
    return mixture_forward(module, rows, gate, choose, arguments)


def grafted_forward(module: HfMoeGraftedBlock, rows: int):
    """Of a block in the place of a dense network; a host's layer calls it with hidden states alone, or adds by it."""
    if module.scales_input or module.scale != 1 or module.fc1_latent_proj is not None:
        return None
    chosen, arguments = chooser(module.gate), route_arguments(module.gate, module.gate.config)
    return mixture_forward(module, rows, module.gate, lambda x: chosen(x, *module.text.now[:2]), arguments)


def layer_forward(module: nn.Module, rows: int):
    """x + attention(norm(x)), then x + mlp(norm(x)): sums and norms in the launches of what follows, where those are
    ours."""
    first, second = module.input_layernorm, module.post_attention_layernorm
    if any(norm_of(norm) is None or "forward" in vars(norm) for norm in (first, second)):
        return None

    def forward(hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attend, network = module.self_attn, module.mlp
        if takes_norm(attend):
            attended, _ = attend(hidden_states, norm=first, **kwargs)
        else:
            attended, _ = attend(hidden_states=first(hidden_states), **kwargs)
        if takes_norm(network):
            return network(attended, residual=hidden_states, norm=second)
        hidden_states, normed = summed_and_normed(attended, hidden_states, second)
        return hidden_states + network(normed)

    return forward


def model_forward(module: nn.Module, rows: int):
    """Of a decoder: no mask is made for a step without padding, whose kernels know how long the text is.

    Transformers hands a mask of four dimensions on as it is.
    """
    heads, config, rotary = [layer.self_attn for layer in module.layers], module.config, module.rotary_emb
    whole = {getattr(x, "head_dim", None) for x in heads} <= {None, 2 * len(rotary.inv_freq)}  # None of latent ones
    windows = getattr(config, "sliding_window", None)  # 0 says that there are none, too
    if rows > experts.MAX_TOKENS or windows or not whole:
        return None
    everything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=rotary.inv_freq.device)
    original = type(module).forward

    def forward(*args, attention_mask=None, **kwargs):
        ours = all(takes_norm(x) and recorded_layer(kwargs.get(CACHE), x.layer_idx) is not None for x in heads)
        if attention_mask is None and ours:
            attention_mask = everything
        return original(module, *args, attention_mask=attention_mask, **kwargs)

    return forward


def takes_norm(module: nn.Module) -> bool:
    """Whether its method is one of ours."""
    return "norm" in signature(module.forward).parameters


ATTENTION, LATENT, ROTARY = ({"forward": x} for x in (attention_forward, latent_forward, angles_forward))
BLOCK, MLP, LAYER = ({"forward": x} for x in (block_forward, mlp_forward, layer_forward))
MODEL = {"forward": model_forward}

# Family and class in Transformers -> functions that give the faster methods.
HOSTS = {
    "olmoe.OlmoeModel": MODEL,
    "olmoe.OlmoeRotaryEmbedding": ROTARY,
    "olmoe.OlmoeAttention": ATTENTION,
    "olmoe.OlmoeSparseMoeBlock": BLOCK,
    "olmoe.OlmoeDecoderLayer": LAYER,
    "mixtral.MixtralModel": MODEL,
    "mixtral.MixtralRotaryEmbedding": ROTARY,
    "mixtral.MixtralAttention": ATTENTION,
    "mixtral.MixtralSparseMoeBlock": BLOCK,
    "mixtral.MixtralDecoderLayer": LAYER,
    "qwen2_moe.Qwen2MoeModel": MODEL,
    "qwen2_moe.Qwen2MoeRotaryEmbedding": ROTARY,
    "qwen2_moe.Qwen2MoeAttention": ATTENTION,
    "qwen2_moe.Qwen2MoeSparseMoeBlock": BLOCK,
    "qwen2_moe.Qwen2MoeMLP": MLP,
    "qwen2_moe.Qwen2MoeDecoderLayer": LAYER,
    "qwen3_moe.Qwen3MoeModel": MODEL,
    "qwen3_moe.Qwen3MoeRotaryEmbedding": ROTARY,
    "qwen3_moe.Qwen3MoeAttention": ATTENTION,
    "qwen3_moe.Qwen3MoeSparseMoeBlock": BLOCK,
    "qwen3_moe.Qwen3MoeMLP": MLP,
    "qwen3_moe.Qwen3MoeDecoderLayer": LAYER,
    "deepseek_v2.DeepseekV2Model": MODEL,
    "deepseek_v2.DeepseekV2Attention": LATENT,
    "deepseek_v2.DeepseekV2Moe": BLOCK,
    "deepseek_v2.DeepseekV2MLP": MLP,
    "deepseek_v2.DeepseekV2DecoderLayer": LAYER,
    "deepseek_v3.DeepseekV3Model": MODEL,
    "deepseek_v3.DeepseekV3RotaryEmbedding": ROTARY,
    "deepseek_v3.DeepseekV3Attention": LATENT,
    "deepseek_v3.DeepseekV3MoE": BLOCK,
    "deepseek_v3.DeepseekV3MLP": MLP,
    "deepseek_v3.DeepseekV3DecoderLayer": LAYER,
    "glm4_moe_lite.Glm4MoeLiteModel": MODEL,
    "glm4_moe_lite.Glm4MoeLiteRotaryEmbedding": ROTARY,
    "glm4_moe_lite.Glm4MoeLiteAttention": LATENT,
    "glm4_moe_lite.Glm4MoeLiteMoE": BLOCK,
    "glm4_moe_lite.Glm4MoeLiteMLP": MLP,
    "glm4_moe_lite.Glm4MoeLiteDecoderLayer": LAYER,
    "mellum.MellumAttention": ATTENTION,
    "mellum.MellumSparseMoeBlock": BLOCK,
    "mellum.MellumMLP": MLP,
    "mellum.MellumDecoderLayer": LAYER,
    # Its layers scale what they add.
    "granitemoe.GraniteMoeModel": MODEL,
    "granitemoe.GraniteMoeRotaryEmbedding": ROTARY,
    "granitemoe.GraniteMoeAttention": ATTENTION,
    "granitemoe.GraniteMoeMoE": BLOCK,
    # Its RoPE turns pairs.
    "ernie4_5_moe.Ernie4_5_MoeSparseMoeBlock": BLOCK,
    "ernie4_5_moe.Ernie4_5_MoeMLP": MLP,
    "ernie4_5_moe.Ernie4_5_MoeDecoderLayer": LAYER,
    # Of these, experts are a graft's.
    "llama.LlamaModel": MODEL,
    "llama.LlamaRotaryEmbedding": ROTARY,
    "llama.LlamaAttention": ATTENTION,
    "llama.LlamaMLP": MLP,
    "llama.LlamaDecoderLayer": LAYER,
    "mistral.MistralModel": MODEL,
    "mistral.MistralRotaryEmbedding": ROTARY,
    "mistral.MistralAttention": ATTENTION,
    "mistral.MistralMLP": MLP,
    "mistral.MistralDecoderLayer": LAYER,
    "qwen2.Qwen2Model": MODEL,
    "qwen2.Qwen2RotaryEmbedding": ROTARY,
    "qwen2.Qwen2Attention": ATTENTION,
    "qwen2.Qwen2MLP": MLP,
    "qwen2.Qwen2DecoderLayer": LAYER,
    "qwen3.Qwen3Model": MODEL,
    "qwen3.Qwen3RotaryEmbedding": ROTARY,
    "qwen3.Qwen3Attention": ATTENTION,
    "qwen3.Qwen3MLP": MLP,
    "qwen3.Qwen3DecoderLayer": LAYER,
}


def host_norm_forward(module: nn.Module, rows: int):
    weight, eps = norm_of(module)
    return lambda hidden_states: norms.rms_norm(hidden_states, weight, eps)


def host_methods(model: nn.Module) -> dict[type, dict]:
    """As METHODS, of the classes of Transformers that the model has modules of."""
    found = {}
    for kind, module in {type(x): x for x in model.modules()}.items():
        if not kind.__module__.startswith("transformers.models."):
            continue
        name = f"{kind.__module__.split('.')[2]}.{kind.__name__}"
        if name in HOSTS:
            found[kind] = HOSTS[name]
        elif "has_gate" in vars(module):
            found[kind] = {"forward": experts_forward}
        elif norm_of(module) is not None:
            found[kind] = {"forward": host_norm_forward}
    return found


def fused_model(model: nn.Module, rows: int) -> AbstractContextManager:
    """As `fused`, of our models, of Transformers' own and of grafts."""
    return fused(model, rows, METHODS | {HfMoeGraftedBlock: {"forward": grafted_forward}} | host_methods(model))
