"""Mixture of attention heads: against JetMoE on its weights, against the formula head by head, in a whole model."""

import cmath
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import JetMoeConfig, JetMoeForCausalLM
from transformers.models.jetmoe.modeling_jetmoe import JetMoeAttention

import hf_moe
from hf_moe.model.balancing import LOSSES, routed, statistics
from hf_moe.model.mixture_of_heads import LINEARS, HfMoeMixtureOfHeads, batched_linear, grouped_linear, looped_linear
from hf_moe.model.modeling_hf_moe import MASKS
from hf_moe.model.rotary import HfMoeRotaryEmbedding
from hf_moe.model.routing import ROUTERS
from tests.conftest import compiles_backward, tiny_config, tiny_model, tokens

HEADS = {"attention_type": "moa", "head_dim": 12}  # 7 experts of 2 heads, 3 of them active: 6 heads a token
JETMOE = {**HEADS, "router_type": "topk_softmax", "attention_output_bias": True, "mlp_layer_types": ["sparse"] * 3}
JETMOE |= {"mlp_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-6, "initializer_range": 0.2}


def jetmoe_config(**changes) -> JetMoeConfig:
    fields = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "kv_channels": 12,
        "num_local_experts": 7,
        "num_experts_per_tok": 3,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
    }
    return JetMoeConfig(**{**fields, **changes})


def from_jetmoe_attention(weights: dict) -> dict:
    key, value = weights["kv_proj.weight"].chunk(2)
    return {
        "gate.weight": weights["experts.router.layer.weight"],
        "q_experts": weights["experts.input_linear.weight"],
        "k_proj.weight": key,
        "v_proj.weight": value,
        "o_experts": weights["experts.output_linear.weight"],
        "o_bias": weights["experts.bias"],
    }


def from_jetmoe(weights: dict) -> dict:
    """Their one bias an MLP is ours on every expert: weights that sum to 1 add it once."""
    ours = {name: weights[name] for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")}
    for layer in range(3):
        parts = {name: x for name, x in weights.items() if name.startswith(f"model.layers.{layer}.")}
        attention = {name.split("self_attention.")[1]: x for name, x in parts.items() if "self_attention." in name}
        prefix = f"model.layers.{layer}"
        ours |= {f"{prefix}.self_attn.{name}": x for name, x in from_jetmoe_attention(attention).items()}
        ours |= {name: x for name, x in parts.items() if "layernorm" in name}
        up = parts[f"{prefix}.mlp.input_linear.weight"]
        ours |= {
            f"{prefix}.mlp.gate.weight": parts[f"{prefix}.mlp.router.layer.weight"],
            f"{prefix}.mlp.experts.gate_up_proj": up,
            f"{prefix}.mlp.experts.gate_up_proj_bias": torch.zeros(up.shape[:2]),
            f"{prefix}.mlp.experts.down_proj": parts[f"{prefix}.mlp.output_linear.weight"],
            f"{prefix}.mlp.experts.down_proj_bias": parts[f"{prefix}.mlp.bias"].expand(len(up), -1),
        }
    return ours


def randomize(module: torch.nn.Module):
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


def inputs(config, batch=2, length=13, padded=False):
    x, positions = torch.randn(batch, length, config.hidden_size), torch.arange(length).unsqueeze(0)
    padding = torch.ones(batch, length)
    if padded:
        padding[0, :4] = 0
    mask = MASKS[config.layer_types[0]](
        config=config, inputs_embeds=x, attention_mask=padding, past_key_values=None, position_ids=positions
    )
    return x, {"position_embeddings": HfMoeRotaryEmbedding(config)(x, positions), "attention_mask": mask}


# ---- JetMoE ----


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_equals_jetmoes(implementation):
    theirs = JetMoeAttention(jetmoe_config(attn_implementation=implementation), layer_idx=1).eval()
    randomize(theirs)
    config = tiny_config(**JETMOE)
    config._attn_implementation = implementation
    ours = HfMoeMixtureOfHeads(config, layer_idx=1).eval()
    ours.load_state_dict(from_jetmoe_attention(theirs.state_dict()))
    x, kwargs = inputs(config, padded=True)
    torch.testing.assert_close(ours(x, **kwargs)[0], theirs(x, **kwargs)[0], rtol=1e-5, atol=1e-5)


def test_model_equals_jetmoe_forward_and_backward():
    theirs = JetMoeForCausalLM(jetmoe_config()).eval()
    randomize(theirs)
    ours = hf_moe.HfMoeForCausalLM(tiny_config(**JETMOE)).eval()
    ours.load_state_dict(from_jetmoe(theirs.state_dict()))
    ids = tokens(2, 15)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    results = [model(ids, attention_mask=mask, labels=ids) for model in (ours, theirs)]
    torch.testing.assert_close(results[0].logits[mask.bool()], results[1].logits[mask.bool()], rtol=1e-5, atol=1e-4)
    for result in results:
        result.loss.backward()
    gradients = [{n: p.grad for n, p in model.named_parameters()} for model in (ours, theirs)]
    expected = from_jetmoe(gradients[1] | {"lm_head.weight": gradients[1]["model.embed_tokens.weight"]})
    for name in gradients[0]:
        if "mlp.experts" not in name or not name.endswith("bias"):
            torch.testing.assert_close(gradients[0][name], expected[name], rtol=1e-3, atol=1e-5)


# ---- the formula ----


def turned(vector: list[float], position: int, theta: float = 10000.0) -> list[float]:
    """RoPE with complex numbers: coordinates j and j + d / 2 are one of them."""
    half = len(vector) // 2
    pairs = [
        complex(vector[j], vector[j + half]) * cmath.exp(1j * position * theta ** (-j / half)) for j in range(half)
    ]
    return [z.real for z in pairs] + [z.imag for z in pairs]


def normed(vector: list[float], eps: float = 1e-5) -> list[float]:
    return [x / math.sqrt(sum(y * y for y in vector) / len(vector) + eps) for x in vector]


def slow_heads(layer, x, weights, index, window):
    """One sequence [S, D]: every token, chosen expert, head and key on its own."""
    size, norm = layer.head_dim, normed if hasattr(layer, "q_norm") else list
    Wq, Wo = layer.q_experts.double(), layer.o_experts.double()
    heads = Wq.shape[1] // size
    k, v = (x @ projection.weight.double().T for projection in (layer.k_proj, layer.v_proj))
    out = torch.zeros_like(x) if layer.o_bias is None else layer.o_bias.double().expand_as(x).clone()
    for t in range(len(x)):
        for gate, i in zip(weights[t].tolist(), index[t].tolist(), strict=True):
            mixed = []
            for h in range(heads):
                rows = slice(h * size, (h + 1) * size)
                q = turned(norm((Wq[i, rows] @ x[t]).tolist()), t)
                seen = range(max(0, t - window + 1), t + 1)
                keys = [turned(norm(k[s, rows].tolist()), s) for s in seen]
                scores = [math.exp(sum(a * b for a, b in zip(q, key, strict=True)) / math.sqrt(size)) for key in keys]
                mixed.append(sum(e / sum(scores) * v[s, rows] for e, s in zip(scores, seen, strict=True)))
            out[t] += gate * (Wo[i] @ torch.cat(mixed))
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {"norm_topk_prob": True, "attention_output_bias": True},
        {"router_type": "sigmoid_topk", "routed_scaling_factor": 2.5, "qk_norm": "head"},
        {"router_type": "topk_softmax", "sliding_window": 4},
        {"num_experts_per_tok": 1, "num_attention_heads": 2, "router_args": {"eval_capacity_factor": 0.5}},
        {"num_key_value_heads": 1, "num_attention_heads": 3},
    ],
    ids=["softmax-bias", "sigmoid-scaled-qk-norm", "window", "k1-capacity", "one-head-an-expert"],
)
def test_equals_the_formula_head_by_head(changes):
    config = tiny_config(**{**HEADS, **changes})
    config._attn_implementation = "eager"
    layer = HfMoeMixtureOfHeads(config, layer_idx=0).eval()
    randomize(layer)
    if config.qk_norm:
        layer.q_norm.weight.data.fill_(1.0)
        layer.k_norm.weight.data.fill_(1.0)
    x, kwargs = inputs(config, batch=1, length=9)
    with torch.no_grad():
        _, weights, index, _, _ = layer.gate(x[0])
        expected = slow_heads(layer, x[0].double(), weights, index, config.sliding_window or 9)
        actual, _ = layer(x, **kwargs)
    if "eval_capacity_factor" in config.router_args:
        assert (weights == 0).any() and weights.any()
    torch.testing.assert_close(actual[0], expected.float(), rtol=1e-4, atol=1e-4)


# ---- ways to compute ----


@pytest.mark.parametrize("linear", [batched_linear, grouped_linear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_linear_equals_the_loop(linear, dtype):
    rows = torch.randn(23, 24, dtype=dtype, requires_grad=True)
    weight = torch.randn(5, 16, 24, dtype=dtype, requires_grad=True)
    expert = torch.randint(0, 4, (23,))  # the last expert has no row
    expert[expert == 1] = 0
    upstream = torch.randn(23, 16, dtype=dtype)
    results = []
    for function in (looped_linear, linear):
        output = function(rows, expert, weight)
        results.append((output, *torch.autograd.grad(output, (rows, weight), upstream)))
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 5e-2}
    torch.testing.assert_close(results[1], results[0], **tolerance)
    assert not results[0][2][4].any()


@pytest.mark.parametrize(("head_dim", "dtype"), [(10, torch.float32), (8, torch.float64)], ids=["odd rows", "float64"])
def test_heads_that_a_grouped_product_cannot_read_are_batched(head_dim, dtype):
    sizes = {"num_key_value_heads": 1, "num_attention_heads": 3, "head_dim": head_dim, "mlp_layer_types": ["dense"]}
    model, outputs = tiny_model(**{**HEADS, **sizes, "num_hidden_layers": 1}).to(dtype), []
    for name in ("eager", "hf_moe"):
        model.set_experts_implementation(name)
        outputs.append(model(tokens()).logits)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_every_experts_implementation_equals_eager(implementation):
    model, ids = tiny_model(**HEADS), tokens()
    assert set(LINEARS) == {None, "eager", "batched_mm"} and model.config._experts_implementation == "grouped_mm"
    results = []
    for name in ("eager", implementation):
        model.set_experts_implementation(name)
        model.zero_grad()
        out = model(ids, labels=ids)
        out.loss.backward()
        results.append((out.logits, {n: p.grad.clone() for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_sizes_that_cannot_be_grouped_choose_eager():
    model = tiny_model(**{**HEADS, "num_key_value_heads": 1, "num_attention_heads": 3, "head_dim": 10})
    assert model.config._experts_implementation == "eager"
    with pytest.raises(ValueError, match=r"num_key_value_heads times head_dim \(10\) in torch.float32"):
        model.set_experts_implementation("grouped_mm")


def test_sdpa_equals_eager():
    model, ids = tiny_model(**HEADS), tokens(2, 16)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    results = []
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            results.append(model(ids, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@compiles_backward
def test_the_training_step_compiles_as_one_graph():
    one_layer = {"num_hidden_layers": 1, "mlp_layer_types": ["dense"]}
    model, ids = tiny_model(**HEADS, **one_layer, router_z_loss_coef=0.001).train(), tokens(2, 9)
    expected = model(ids, labels=ids, use_cache=False).loss
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_bf16_is_near_fp32():
    """With a hash router, so that rounding cannot change the experts."""
    model, ids = tiny_model(**HEADS, router_type="hash"), tokens(2, 17)
    with torch.no_grad():
        expected = model(ids).logits
        actual = model.to(torch.bfloat16)(ids).logits
    assert actual.dtype == torch.bfloat16
    assert (actual.float() - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_autocast_trains(implementation):
    model, ids = tiny_model(**HEADS).train(), tokens()
    model.set_attn_implementation(implementation)
    with torch.autocast(ids.device.type, torch.bfloat16):
        out = model(ids, labels=ids)
    out.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# ---- routing ----


@pytest.mark.parametrize("mlps", [["dense"] * 3, ["dense", "sparse", "sparse"]], ids=["dense", "sparse"])
def test_losses_average_over_every_router(mlps):
    coefficients = {"router_aux_loss_coef": 0.3, "router_z_loss_coef": 0.02}
    model, ids = tiny_model(**HEADS, **coefficients, mlp_layer_types=mlps).train(), tokens(2, 11)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    routers = {name: module for name, module in model.named_modules() if name.endswith(".gate")}
    seen = {}
    for name, router in routers.items():
        router.register_forward_hook(lambda module, x, output, name=name: seen.update({name: output[0]}))
    plain = model(ids, attention_mask=mask, labels=ids, output_router_logits=False).loss
    out = model(ids, attention_mask=mask, labels=ids)

    # One entry a router, a layer's heads before its MLP.
    assert len(routers) == 3 + mlps.count("sparse") and next(iter(routers)) == "model.layers.0.self_attn.gate"
    torch.testing.assert_close(out.router_logits, tuple(seen[name] for name in routers))
    layers = [
        routed(logits, logits.softmax(-1), index, mask.flatten(), sequences=2)
        for logits, index in zip(out.router_logits, out.router_indices, strict=True)
    ]
    expected = {
        name: torch.stack([LOSSES[name](layer, statistics(layer), model.config) for layer in layers]).mean()
        for name in coefficients
    }
    torch.testing.assert_close(out.router_losses, expected)
    torch.testing.assert_close(out.loss, plain + sum(coefficients[name] * x for name, x in expected.items()))


def test_padding_takes_no_place_and_changes_no_gradient():
    """Under a capacity that drops: were padding counted, other tokens would be dropped."""
    changes = {"expert_capacity_factor": 0.7, "router_aux_loss_coef": 0.5}
    model = tiny_model(**HEADS, **changes).train()
    ids = tokens(1, 9)
    results = []
    for padding in (0, 5):
        model.zero_grad()
        padded = torch.cat((torch.zeros(1, padding, dtype=torch.long), ids), dim=1)
        mask = (torch.arange(padding + 9) >= padding).long().unsqueeze(0)
        labels = padded.masked_fill(mask == 0, -100)
        labels[0, padding] = -100  # left padding would give the first token a prompt
        loss = model(padded, attention_mask=mask, labels=labels).loss
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router_type", sorted({x for x in ROUTERS if ROUTERS[x].fills} - {"expert_choice"}))
def test_every_router_trains_and_generates(router_type):
    changes = {**HEADS, "router_type": router_type}
    if router_type == "gshard":
        changes |= {"num_experts_per_tok": 2, "num_attention_heads": 4}
    if router_type == "dense":
        changes |= {"num_attention_heads": 14}
    model, ids = tiny_model(**changes).train(), tokens(4, 31)
    model(ids, labels=ids).loss.backward()
    for layer in model.model.layers:
        for weight in (layer.self_attn.q_experts, layer.self_attn.o_experts):
            assert weight.grad.flatten(1).any(dim=1).all()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert silent == []

    model.eval()
    ids = tokens(2, 5)
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    for _ in range(5):
        ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(generated, ids)


def test_heads_hash_unlike_mlps():
    model = tiny_model(**HEADS, router_type="hash", mlp_layer_types=["sparse"] * 3)
    tables = [m.hash_table for name, m in model.named_modules() if name.endswith(".gate")]
    assert len(tables) == 6
    assert not any(torch.equal(a, b) for i, a in enumerate(tables) for b in tables[:i])


# ---- in a model ----


def test_left_padding_and_static_cache_generate_the_same():
    model, ids = tiny_model(**HEADS), tokens(1, 6)
    options = {"max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.long), ids), dim=1)
    mask = (torch.arange(10) >= 4).long().unsqueeze(0)
    for cache in ("dynamic", "static"):
        generated = model.generate(padded, attention_mask=mask, cache_implementation=cache, **options)
        assert torch.equal(generated[:, 4:], expected)


def test_the_cache_holds_the_shared_heads():
    layer = tiny_model(**HEADS)(tokens(2, 11)).past_key_values.layers[1]
    assert layer.keys.shape == layer.values.shape == (2, 2, 11, 12)


def test_attention_probabilities_are_returned():
    model = tiny_model(**HEADS)
    model.set_attn_implementation("eager")
    attentions = model(tokens(2, 11), output_attentions=True).attentions
    assert [x.shape for x in attentions] == [(2, 6, 11, 11)] * 3


def test_checkpointing_changes_no_gradient():
    results = []
    for checkpointing in (False, True):
        model, ids = tiny_model(**HEADS, router_aux_loss_coef=0.5).train(), tokens()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(ids, labels=ids).loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters()})
    torch.testing.assert_close(results[1], results[0])


def test_saves_and_loads(tmp_path):
    model, ids = tiny_model(**JETMOE, router_args={"selection_bias": True}), tokens()
    attention = model.model.layers[0].self_attn
    for weight in (attention.q_experts, attention.o_experts):
        assert weight.std().item() == pytest.approx(0.2, rel=0.1)
    assert not attention.o_bias.any() and not attention.gate.e_score_correction_bias.any()
    attention.gate.e_score_correction_bias.normal_()
    model.save_pretrained(tmp_path)
    loaded = hf_moe.HfMoeForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    half = hf_moe.HfMoeForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).model.layers[0].self_attn
    assert half.gate.e_score_correction_bias.dtype == torch.float32 and half.q_experts.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_experts_per_tok": 2},
            r"num_attention_heads \(6\) must be num_key_value_heads \(2\) times num_exp.*\(2\)",
        ),
        (
            {"router_type": "dense"},
            r"num_attention_heads \(6\) must be num_key_value_heads \(2\) times num_experts \(7\)",
        ),
        ({"router_type": "expert_choice"}, r"'expert_choice' gives a token any number of experts.* needs 3"),
        ({"attention_bias": True}, r"attention_bias \(True\) needs attention_type 'gqa'"),
        ({"qk_norm": "head_after_rope"}, r"qk_norm \('head_after_rope'\) needs attention_type 'gqa'"),
        ({"qk_norm": "projection"}, r"qk_norm \('projection'\) needs attention_type 'gqa'"),
    ],
    ids=["heads", "dense", "expert-choice", "bias", "norm after RoPE", "norm"],
)
def test_contradictions_name_the_numbers(changes, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        tiny_config(**{**HEADS, **changes})
