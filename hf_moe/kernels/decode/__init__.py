"""Generation with fewer and faster launches: what modules' methods become for a prompt, or a step of few tokens.

`METHODS` names, for a class of modules, the functions that give a module's faster methods for a number of tokens, or
None where this module has what the kernels don't know; its own method then stays.
"""

from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from ...model.attention import HfMoeAttention
from ...model.chosen_experts import tell
from ...model.decoding import HfMoeReservedCache, HfMoeReservedLayer
from ...model.host import CACHE
from ...model.latent_attention import HfMoeLatentAttention
from ...model.mlp import HfMoeMLP
from ...model.modeling_hf_moe import (
    HfMoeClampedExperts,
    HfMoeDecoderLayer,
    HfMoeExperts,
    HfMoeModel,
    HfMoeSparseMoeBlock,
)
from ...model.norms import PLACEMENTS
from ...model.rms_norm import HfMoeRMSNorm
from ...model.rotary import HfMoeRotaryEmbedding
from ...model.router import HfMoeRouter
from ...stored_weights import in_full
from ..formula import Formula, activation, formula
from . import adapters, experts, few_tokens, grouped, latent, norms, products, rotary, routers
from .stored import Weight, alike, weight_of


def matrix_of(linear: nn.Module) -> Weight | None:
    """What the kernels read of a layer; None where it does more than a product: a bias, an adapter."""
    return weight_of(linear.weight) if type(linear) is nn.Linear and linear.bias is None else None


def projected(rows: int, *linears: nn.Module):
    """The products of x [T, A] with up to three layers, as `products.linear` has them; in a launch of its own where
    one is stored in another form, and by the layer itself where it does more than the kernels of so many rows."""
    parts = [adapters.of_linear(linear) or (linear, None) for linear in linears]
    added = [adapter for _, adapter in parts]
    weights = [matrix_of(linear) for linear, _ in parts]
    few = weights[0] is not None and products.of_few(rows, weights[0].shape[1], weights[0], True)
    one_rank = len({len(adapter.a) for adapter in added if adapter is not None}) == 1
    if alike(*weights) and (not any(added) or (few and one_rank)):
        return lambda x, **further: products.linear(x, *weights, adapters=added, **further)

    def project(x: torch.Tensor, norm=None, counted: tuple[torch.Tensor, int] | None = None) -> list[torch.Tensor]:
        x = x if norm is None else norms.rms_norm(x, *norm)
        if counted is not None:
            counted[0].add_(counted[1])
        plain = zip(linears, weights, added, strict=True)
        return [
            linear(x) if weight is None or adapter is not None else products.linear(x, weight)[0]
            for linear, weight, adapter in plain
        ]

    return project


def weight_and_epsilon(norm: HfMoeRMSNorm) -> tuple[torch.Tensor, float]:
    return norm.weight, norm.variance_epsilon


def norm_forward(module: HfMoeRMSNorm, rows: int):
    return lambda hidden_states: norms.rms_norm(hidden_states, *weight_and_epsilon(module))


def counters(weight: torch.Tensor, count: int) -> torch.Tensor:
    """Where programs of one launch count who has come to its end."""
    return torch.zeros(count, dtype=torch.int32, device=weight.device)


def summed_and_normed(hidden_states: torch.Tensor, residual: torch.Tensor | None, norm: HfMoeRMSNorm | None):
    """The sum of both, or the residual alone, which goes on beside a network; and what the network reads."""
    if norm is None:
        return residual, hidden_states
    return norms.add_rms_norm(residual, hidden_states, *weight_and_epsilon(norm))


def network(module: HfMoeMLP, rows: int) -> experts.Network | None:
    """The weights of a dense network, or None where the kernels can't take its place."""
    names = [name for name in ("gate_proj", "up_proj", "down_proj") if hasattr(module, name)]
    if rows > experts.MAX_TOKENS or activation(module.act_fn) is None:
        return None
    weights = [matrix_of(getattr(module, name)) for name in names]
    if not alike(*weights) or not experts.cuts(weights[-1], experts.part_of(weights[-1])):
        return None
    weights = [weight.unsqueeze() for weight in weights]
    return experts.Network(*weights) if len(weights) == 3 else experts.Network(None, *weights)


def mlp_forward(module: HfMoeMLP, rows: int):
    weights, computed = network(module, rows), Formula(activation(module.act_fn), hasattr(module, "gate_proj"))

    def forward(hidden_states: torch.Tensor, residual: torch.Tensor | None = None, norm=None) -> torch.Tensor:
        residual, x = summed_and_normed(hidden_states, residual, norm)
        x = x.flatten(0, -2)
        return experts.mixture(x, None, None, None, weights, computed, residual).view_as(hidden_states)

    return weights and forward


def route_arguments(gate: nn.Module, config):
    """What `routers.route` needs beside x, or None where the router is not a plain one."""
    args, limited = config.router_args, config.topk_group < config.n_group
    plain_router = type(gate) is HfMoeRouter and config.router_type in routers.SCORES
    if not plain_router or gate.weight.numel() > 2**20 or args.get("eval_capacity_factor") or args.get("router_bias"):
        return None
    best = {"best": 1, "two_best": 2}[args.get("group_score", "two_best")]
    groups = routers.Groups(config.n_group, config.topk_group, best) if limited else routers.ALL
    settings = (config.num_experts_per_tok, config.router_type, config.norm_topk_prob)
    return gate.weight, gate.e_score_correction_bias, *settings, float(config.routed_scaling_factor), False, groups


def a_token(token_mask: torch.Tensor | None) -> torch.Tensor | None:
    """[T], side by side, of [B, S]."""
    return None if token_mask is None else token_mask.reshape(-1).contiguous()


def chooser(gate: nn.Module):
    """weights and index [T, K] as a function of x [T, D], hidden_states' mask and token ids."""
    arguments = route_arguments(gate, gate.config)

    def chosen(x: torch.Tensor, token_mask: torch.Tensor | None, input_ids: torch.Tensor | None):
        mask = a_token(token_mask)
        if arguments is not None:
            _, weights, index = routers.route(x, *arguments, mask)
            tell(gate, index)
            return weights, index
        ids = None if input_ids is None else input_ids.reshape(-1)
        return gate(x, mask, ids)[1:3]

    return chosen


def moe_forward(module: HfMoeSparseMoeBlock, rows: int):
    routed, added = adapters.of_experts(module.experts) or (module.experts, {})
    if type(routed) not in (HfMoeExperts, HfMoeClampedExperts):  # as it is an adapter that does more
        return None
    computed = formula(routed)
    further = (module.shared_expert_gate, module.fc1_latent_proj)  # between router, experts and sum
    if computed is None or module.scales_input or any(x is not None for x in further):
        return None
    if rows > (few_tokens.MAX_TOKENS if added else experts.MAX_TOKENS):
        compute = adapters.of_many(routed, added)
        return compute and many_forward(module, compute)
    return few_forward(module, routed, computed, rows, (added.get(routed.up_name), added.get("down_proj")))


def many_forward(module: HfMoeSparseMoeBlock, compute):
    """Of a prompt, or with an adapter of more tokens than the kernels for few take. compute: `adapters.of_many`."""
    chosen = chooser(module.gate)

    def forward(hidden_states: torch.Tensor, token_mask=None, input_ids=None, residual=None, norm=None):
        residual, x = summed_and_normed(hidden_states, residual, norm)
        x = x.flatten(0, -2)
        weights, index = chosen(x, token_mask, input_ids)
        out = compute(x, index, weights)
        if module.shared_experts is not None:
            out = out + module.shared_experts(x)
        out = out.view_as(hidden_states)
        return out if residual is None else out + residual

    return forward


def routed_rows(hidden_states, residual, norm, gate, arguments, arrived: torch.Tensor, choose, token_mask=None):
    """The residual, x [T, D] and what `choose` has of it, weights and index [T, K]; in one launch with the sum and the
    norm before them where `routers.route` can take the place of the router `gate`, by its `arguments`."""
    if norm is not None and arguments is not None:
        both = (residual.flatten(0, -2), hidden_states.flatten(0, -2).contiguous())
        found = routers.normed_route(*both, *weight_and_epsilon(norm), *arguments, arrived, a_token(token_mask))
        tell(gate, found[3])
        return found
    residual, x = summed_and_normed(hidden_states, residual, norm)
    x = x.flatten(0, -2)
    return residual, x, *choose(x)


def experts_network(up: torch.Tensor, down: torch.Tensor, gated: bool, biases) -> experts.Network | None:
    """Of fused up [E, U, D] and down [E, D, I], with biases [E, U] and [E, D] or None.

    None where the kernels can't read them: the second half of rows begins a block.
    """
    weights = weight_of(up), weight_of(down)
    if not alike(*weights) or (gated and weights[0].shape[1] // 2 % weights[0].block[0]):
        return None
    ups = weights[0].halves() if gated else (None, weights[0])
    if biases is not None:
        biases = (*(biases[0].chunk(2, dim=1) if gated else (None, biases[0])), biases[1])
    return experts.Network(*ups, weights[1], biases)


def turned_network(
    up: torch.Tensor, down: torch.Tensor, gated: bool, interleaved: bool, biases
) -> experts.Network | None:
    """As `experts_network`, of up [E, D, U] and down [E, I, D]; None where they are stored in fewer bits."""
    whole, back = weight_of(up), weight_of(down)
    if whole is None or back is None or whole.form or back.form:
        return None
    count, inner, size = down.shape
    whole, back = whole._replace(shape=(count, inner, size)), back._replace(shape=(count, size, inner))
    if biases is not None:
        of_up = biases[0]
        halves = (of_up[:, 0::2], of_up[:, 1::2]) if interleaved else of_up.chunk(2, dim=1)
        biases = (*(halves if gated else (None, of_up)), biases[1])
    return experts.Network(whole if gated else None, whole, back, biases, 2 if interleaved else 1)


def few_forward(module: HfMoeSparseMoeBlock, routed: nn.Module, computed: Formula, rows: int, on_experts: tuple):
    config, shared = module.gate.config, None
    up, biases = getattr(routed, routed.up_name), None
    if routed.has_bias:
        biases = (getattr(routed, f"{routed.up_name}_bias"), routed.down_proj_bias)
    weights_of = experts_network(up, routed.down_proj, config.gated_mlp, biases)
    if weights_of is None:
        return None
    if module.shared_experts is not None and not computed.clamped:  # only the routed ones are
        shared = network(module.shared_experts, rows)
    beside = module.shared_experts if shared is None or not experts.joined(weights_of, shared) else None
    shared = shared if beside is None else None
    chosen, arguments, arrived = chooser(module.gate), route_arguments(module.gate, config), counters(up, rows)

    def forward(hidden_states: torch.Tensor, token_mask=None, input_ids=None, residual=None, norm=None):
        choose = partial(chosen, token_mask=token_mask, input_ids=input_ids)
        routing = (module.gate, arguments, arrived, choose, token_mask)
        residual, x, weights, index = routed_rows(hidden_states, residual, norm, *routing)
        if beside is not None:  # in launches of its own
            added = beside(x)
            residual = added if residual is None else added + residual.view_as(added)
        out = experts.mixture(x, weights, index, weights_of, shared, computed, residual, on_experts)
        return out.view_as(hidden_states)

    return forward


def recorded_layer(past_key_values, layer_idx: int) -> HfMoeReservedLayer | None:
    """The layer of the cache, if it is one whose step is being recorded."""
    cached = None if past_key_values is None else past_key_values.layers[layer_idx]
    return cached if isinstance(cached, HfMoeReservedLayer) and cached.recorded else None


def tokens_read(past_key_values) -> torch.Tensor | None:
    """[B], False in rows that nobody reads any more, of a cache whose step is being recorded; None where all are."""
    ours = isinstance(past_key_values, HfMoeReservedCache) and past_key_values.is_compileable
    return past_key_values.unfinished if ours else None


def visible(attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """[B, Q, S], true where a position may be seen, of what sdpa or eager attention gets [B, 1, Q, S].

    None where all may, which a single column says, too.
    """
    if attention_mask is None or attention_mask.shape[-1] == 1:
        return None
    mask = attention_mask[:, 0]
    return mask if mask.dtype == torch.bool else mask == 0  # eager attention adds it


def latent_forward(module: nn.Module, rows: int):
    """Of our latent attention, and of Transformers' DeepSeek-V2 and V3, which have the same names."""
    if rows > experts.MAX_TOKENS:
        return None
    config = module.config
    names = ["q_proj"] if config.q_lora_rank is None else ["q_a_proj", "q_b_proj"]
    first = getattr(module, names[0])
    if getattr(module, "absorb", None) is False or matrix_of(module.kv_b_proj) is None:
        return None
    project, back = projected(rows, first, module.kv_a_proj_with_mqa), projected(rows, module.o_proj)
    further = None if config.q_lora_rank is None else projected(rows, module.q_b_proj)
    sizes = [config.qk_nope_head_dim, config.v_head_dim]
    up = in_full(module.kv_b_proj.weight).view(-1, sum(sizes), config.kv_lora_rank)
    key_up, value_up = up.split(sizes, dim=1)  # [H, d, r]
    original = type(module).forward

    def forward(hidden_states, position_embeddings, attention_mask=None, norm=None, **kwargs):
        past_key_values = kwargs.get("past_key_values", kwargs.get(CACHE))
        cached = recorded_layer(past_key_values, module.layer_idx)
        if cached is None:
            hidden_states = hidden_states if norm is None else norm(hidden_states)
            kwargs |= {"position_embeddings": position_embeddings, "attention_mask": attention_mask}
            return original(module, hidden_states, **kwargs)
        x, norm = hidden_states.flatten(0, 1), norm and weight_and_epsilon(norm)
        query, new_latent = project(x, norm=norm)
        if further is not None:
            query = further(query, norm=weight_and_epsilon(module.q_a_layernorm))[0]
        as_complex = isinstance(position_embeddings, torch.Tensor)  # V2's, of one number a pair
        if as_complex:
            parts = position_embeddings.real, position_embeddings.imag
            position_embeddings = [torch.cat((part, part), dim=-1) for part in parts]
        cos, sin = position_embeddings
        out = latent.latent_attention(
            query.view(len(x), len(key_up), -1),
            new_latent,
            module.kv_a_layernorm.weight,
            key_up,
            value_up,
            cos,
            sin,
            cached.keys,
            cached.values,
            cached.cumulative_length,
            visible(attention_mask),
            tokens_read(past_key_values),
            scale=module.scaling,
            eps=module.kv_a_layernorm.variance_epsilon,
            interleaved=as_complex or config.rope_interleave,
            paired=as_complex,
            softcap=getattr(config, "attn_logit_softcapping", None),
        )
        count = (cached.cumulative_length, cos.shape[1])
        out = back(out.flatten(1), counted=count)[0]
        return out.view_as(hidden_states), None

    return forward


def grouped_forward(module: HfMoeAttention, rows: int):
    if rows > experts.MAX_TOKENS:
        return None
    config = module.config
    normed = config.qk_norm in ("head", "projection")
    simple = module.has_rope and config.clip_qkv is None and not config.attention_sinks
    simple = simple and (type(module.q_norm) is HfMoeRMSNorm if normed else config.qk_norm is None)
    if not simple:
        return None
    project, back = projected(rows, module.q_proj, module.k_proj, module.v_proj), projected(rows, module.o_proj)
    arrived = counters(module.q_proj.weight, rows * config.num_key_value_heads)
    norm_weights = (module.q_norm.weight, module.k_norm.weight) if normed else None
    original = type(module).forward

    def forward(hidden_states, position_embeddings, attention_mask=None, past_key_values=None, norm=None, **kwargs):
        cached = recorded_layer(past_key_values, module.layer_idx)
        cos, sin = position_embeddings
        if cached is None or cos.shape[-1] != module.head_dim:
            hidden_states = hidden_states if norm is None else norm(hidden_states)
            return original(module, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        out = grouped.grouped_attention(
            *project(hidden_states.flatten(0, 1), norm=norm and weight_and_epsilon(norm)),
            norm_weights,
            cos,
            sin,
            cached.keys,
            cached.values,
            cached.cumulative_length,
            visible(attention_mask),
            tokens_read(past_key_values),
            arrived,
            scale=module.scaling,
            eps=config.rms_norm_eps,
            interleaved=config.rope_interleave,
            softcap=config.attn_logit_softcapping,
        )
        count = (cached.cumulative_length, cos.shape[1])
        return back(out.flatten(1), counted=count)[0].view_as(hidden_states), None

    return forward


def many_rotated(module: HfMoeAttention, rows: int):
    """RoPE of a prompt's queries and keys; a step's is part of `grouped_forward`."""
    if rows <= experts.MAX_TOKENS:
        return None
    interleaved, original = module.config.rope_interleave, type(module).rotated

    def rotated(query, key, cos, sin):
        if cos.shape[-1] != module.head_dim:
            return original(module, query, key, cos, sin)
        return rotary.rotated(query, key, cos, sin, interleaved)

    return rotated


def angles_forward(module: HfMoeRotaryEmbedding, rows: int):
    if rows > experts.MAX_TOKENS or "dynamic" in module.rope_type or module.rope_type == "longrope":
        return None  # those frequencies depend on the length
    return lambda x, position_ids: rotary.angles(position_ids, module.inv_freq, module.attention_scaling, x.dtype)


def masks_of_step(module: HfMoeModel, rows: int):
    """None for a step's attention without padding: its kernels know how long the text is."""
    original, rotary_emb = module.attention_masks, module.rotary_emb
    attentions = [x.self_attn for x in module.layers] + [x.block.self_attn for x in module.mtp_layers]
    sizes = {x.head_dim for x in attentions if type(x) is HfMoeAttention}
    whole = type(rotary_emb) is HfMoeRotaryEmbedding and sizes <= {2 * len(rotary_emb.inv_freq)}
    full = set(module.config.layer_types) == {"full_attention"}

    def attention_masks(attention_mask, inputs_embeds, past_key_values, position_ids):
        kernels = all("forward" in vars(attention) for attention in attentions)
        cached = isinstance(past_key_values, HfMoeReservedCache) and past_key_values.is_compileable
        if attention_mask is None and whole and full and kernels and cached:
            return {"full_attention": None}
        return original(attention_mask, inputs_embeds, past_key_values, position_ids)

    return attention_masks


def tokens_of_step(module: HfMoeModel, rows: int):
    """None of rows that have ended: those choose no experts. Capacity would notice that."""
    if module.config.limits_experts:
        return None
    original = module.token_mask

    def token_mask(attention_mask, inputs_embeds, past_key_values):
        unfinished = tokens_read(past_key_values)
        if unfinished is None:
            return original(attention_mask, inputs_embeds, past_key_values)
        return unfinished.unsqueeze(1).expand(inputs_embeds.shape[:2]).contiguous()

    return token_mask


def layer_forward(module: HfMoeDecoderLayer, rows: int):
    first, second = (getattr(module, f"{name}_layernorm", None) for name in ("input", "post_attention"))
    plain_norms = type(first) is type(second) is HfMoeRMSNorm
    if module.norms != PLACEMENTS["pre"] or module.residual_multiplier != 1 or not plain_norms:
        return None

    def forward(hidden_states, token_mask=None, input_ids=None, layer_cache=None, **kwargs) -> torch.Tensor:
        kwargs["past_key_values"] = layer_cache
        routing = {"token_mask": token_mask, "input_ids": input_ids}
        heads_routing, mlp_routing = (routing if x else {} for x in (module.self_attn.routes, module.sparse))
        if "forward" in vars(module.self_attn):  # one of ours: it norms, too
            attended, _ = module.self_attn(hidden_states, norm=first, **heads_routing, **kwargs)
        else:
            attended, _ = module.self_attn(first(hidden_states), **heads_routing, **kwargs)
        if "forward" in vars(module.mlp):  # it adds and norms
            return module.mlp(attended, residual=hidden_states, norm=second, **mlp_routing)
        hidden_states, normed = summed_and_normed(attended, hidden_states, second)
        return hidden_states + module.mlp(normed, **mlp_routing)

    return forward


METHODS = {
    HfMoeModel: {"attention_masks": masks_of_step, "token_mask": tokens_of_step},
    HfMoeRotaryEmbedding: {"forward": angles_forward},
    HfMoeDecoderLayer: {"forward": layer_forward},
    HfMoeRMSNorm: {"forward": norm_forward},
    HfMoeMLP: {"forward": mlp_forward},
    HfMoeSparseMoeBlock: {"forward": moe_forward},
    HfMoeLatentAttention: {"forward": latent_forward},
    HfMoeAttention: {"forward": grouped_forward, "rotated": many_rotated},
}


@contextmanager
def fused(model: nn.Module, rows: int, methods: dict[type, dict] = METHODS):
    """Inside, the modules of `model` that `methods` names compute `rows` tokens with the kernels, without gradients.

    Gives the functions that do so: what they hold must live as long as what was recorded.
    """
    changed = []
    try:
        for module in model.modules():
            for name, make in methods.get(type(module), {}).items():
                method = None if name in vars(module) else make(module, rows)
                if method is not None:
                    setattr(module, name, method)
                    changed.append((module, name))
        yield [getattr(module, name) for module, name in changed]
    finally:
        for module, name in changed:
            delattr(module, name)
