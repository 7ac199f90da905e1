"""A decoding step with the kernels in Transformers' own models and in grafts, beside what these compute themselves."""

from contextlib import nullcontext
from importlib import import_module
from inspect import signature

import pytest
import torch

pytest.importorskip("triton")

from transformers import LlamaConfig, MistralConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from hf_moe import HfMoeGraftConfig, HfMoeGraftForCausalLM
from hf_moe.kernels.decode.host_models import (
    ATTENTION,
    BLOCK,
    HOSTS,
    LATENT,
    LAYER,
    MLP,
    MODEL,
    ROTARY,
    ROUTERS,
    fused_model,
)
from hf_moe.model.decoding import HfMoeReservedCache
from hf_moe.model.host import CACHE
from tests.families import EXPERTS, TOP_K, tiny

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}

# What a forward must take for its kernel to stand in for it; a host that differs is to be read again.
TAKES = {
    "model": {"input_ids", "inputs_embeds", "attention_mask", "position_ids", CACHE, "kwargs"},
    "rotary": {"x", "position_ids"},
    "attention": {"hidden_states", "position_embeddings", "attention_mask", CACHE, "kwargs"},
    "layer": {"hidden_states", "position_embeddings", "attention_mask", "position_ids", CACHE, "kwargs"},
}
ROLES = [(ROTARY, "rotary"), (ATTENTION, "attention"), (LATENT, "attention"), (LAYER, "layer"), (BLOCK, "block")]
ROLES += [(MLP, "network"), (MODEL, "model")]
LISTED = [(name, next(role for known, role in ROLES if known is made)) for name, made in HOSTS.items()]
LISTED_FAMILIES = {name.split(".")[0] for name in HOSTS}


def of_the_host(family: str) -> dict[str, type]:
    return vars(import_module(f"transformers.models.{family}.modeling_{family}"))


@pytest.mark.parametrize(("name", "role"), LISTED)
def test_a_listed_class_is_there_and_takes_what_it_took(name, role):
    family, kind = name.split(".")
    found = set(signature(of_the_host(family)[kind].forward).parameters) - {"self", "use_cache"}
    assert found == TAKES[role] if role in TAKES else len(found) == 1


@pytest.mark.parametrize("name", ROUTERS)
def test_a_listed_router_is_there_and_takes_what_it_took(name):
    (router,) = {x[name] for x in map(of_the_host, LISTED_FAMILIES) if name in x}
    assert set(signature(router.forward).parameters) == {"self", "hidden_states"}


def test_each_listed_family_is_tried():
    assert {name.split(",")[0] for name in (*CASES, *GRAFTS)} == LISTED_FAMILIES


# ---- one step ----

CASES = {
    "olmoe": {},
    "olmoe, norm_topk_prob": {"norm_topk_prob": True},
    "mixtral": {},
    "mixtral, window": {"sliding_window": 5},
    "qwen3_moe": {"mlp_only_layers": [0], "norm_topk_prob": True, "head_dim": 10},
    "qwen3_moe, window": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    "olmoe, biases": {"attention_bias": True},
    "mellum": {"head_dim": 10},
    "granitemoe": {"attention_multiplier": 0.4, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    "ernie4_5_moe": {"head_dim": 10},
    "qwen2_moe": {},
    "glm4_moe_lite": {"v_head_dim": 10},
    "deepseek_v2": {"routed_scaling_factor": 1.5, "v_head_dim": 10},
    "deepseek_v2, no groups": {"topk_method": "greedy", "q_lora_rank": None, "n_group": 1},
    "deepseek_v3": {"v_head_dim": 10},
    "deepseek_v3, biases": {"v_head_dim": 10, "attention_bias": True},
    "deepseek_v3, no groups": {"q_lora_rank": None, "n_group": 1, "rope_interleave": False, "n_shared_experts": 2},
}
GRAFTS = {
    "llama": (LlamaConfig, {}, {}),
    "mistral, window, one layer": (MistralConfig, {"sliding_window": 5}, {"sparse_layers": [1]}),
    "qwen3, shared": (Qwen3Config, {"head_dim": 10}, {"n_shared_experts": 1}),
    "llama, gated shared": (LlamaConfig, {}, {"n_shared_experts": 1, "shared_expert_gate": True}),
    "qwen2, biases": (Qwen2Config, {}, {"router_type": "sigmoid_topk", "norm_topk_prob": True}),
}
# Blocks that are not listed; their experts, and norms, are known by what they compute.
OTHERS = ("glm4_moe", "gpt_oss")


def model_of(name: str, dtype: torch.dtype, **changes) -> PreTrainedModel:
    """With wide weights, and norms that are not one."""
    torch.manual_seed(0)
    if name in GRAFTS:
        kind, fields, graft = GRAFTS[name]
        sizes = {"vocab_size": 128, "hidden_size": 40, "intermediate_size": 24, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
        backbone = kind(**sizes | fields, max_position_embeddings=64, pad_token_id=0)
        experts = {"num_experts": EXPERTS, "num_experts_per_tok": TOP_K} | graft | changes
        config = HfMoeGraftConfig(backbone=backbone, **experts)
        model = HfMoeGraftForCausalLM(config)
    else:
        fields = {"num_hidden_layers": 2, "initializer_range": 0.2} | CASES.get(name, {}) | changes
        model = tiny(name.split(",")[0], **fields)
    for key, x in model.named_parameters():
        if x.dim() == 1 and "norm" in key:
            torch.nn.init.uniform_(x, 0.5, 1.5)
        if key.endswith("proj.bias") or key.endswith("mqa.bias"):
            torch.nn.init.uniform_(x, -0.5, 0.5)
    return model.to(DEVICE, dtype).eval()


def steps(model: PreTrainedModel, rows: int, padding: int, unwritten: float = float("nan")):
    """Logits of two steps [B, 2, V], as the model has them for the whole text and with the kernels; and the names of
    the classes that these changed."""
    length, new = 9, 2
    ids = torch.randint(3, 100, (rows, length + new), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[-1, :padding] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    model.set_experts_implementation("eager")
    expected = model(ids, attention_mask=mask, position_ids=position_ids).logits[:, length:]

    cache = HfMoeReservedCache(model.config.num_hidden_layers, 20)
    prompt = {"attention_mask": mask[:, :length], "position_ids": position_ids[:, :length], CACHE: cache}
    with fused_model(model, rows * length) if rows == 1 else nullcontext():
        model(ids[:, :length], use_cache=True, **prompt)
    whole = torch.ones(rows, cache.layers[0].max_cache_len, dtype=torch.bool, device=DEVICE)
    whole[:, : length + new] = mask.bool()
    with fused_model(model, rows):
        changed = {type(module).__name__ for module in model.modules() if "forward" in vars(module)}
        for layer in cache.layers:
            layer.recorded = True
            layer.cumulative_length.fill_(length)
            # Nothing may read what isn't written.
            layer.keys[:, :, length:] = layer.values[:, :, length:] = unwritten
        actual = [
            model(
                ids[:, place : place + 1],
                attention_mask=whole if padding else None,
                position_ids=position_ids[:, place : place + 1],
                use_cache=True,
                **{CACHE: cache},
            ).logits
            for place in range(length, length + new)
        ]
    assert all("forward" not in vars(module) for module in model.modules())
    return torch.cat(actual, dim=1).float(), expected.float(), changed


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE[dtype] * float(expected.abs().max()))


@pytest.mark.parametrize(("rows", "padding"), [(3, 4), (1, 0)], ids=["three rows, padding", "one row"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_step_is_that_of_transformers(name, rows, padding):
    model = model_of(name, torch.float32)
    own_attention = "ernie" in name  # reads the whole cache, and masks
    actual, expected, changed = steps(model, rows, padding, 0.0 if own_attention else float("nan"))
    assert_close(actual, expected, torch.float32)
    listed = {kind.split(".")[1] for kind in HOSTS} & {type(x).__name__ for x in model.modules()}
    windows = {kind for kind in listed if "window" in name and kind.endswith("Model")}  # whose masks are made
    assert listed - changed == windows and any(kind.endswith("RMSNorm") for kind in changed)


@pytest.mark.parametrize(("rows", "padding"), [(3, 4), (1, 0)], ids=["three rows, padding", "one row"])
@pytest.mark.parametrize("name", GRAFTS)
@torch.no_grad()
def test_a_step_of_a_graft_is_that_of_the_graft(name, rows, padding):
    actual, expected, changed = steps(model_of(name, torch.float32), rows, padding)
    assert_close(actual, expected, torch.float32)
    kind = name.split(",")[0].capitalize()
    assert {"HfMoeGraftedBlock", f"{kind}Attention", f"{kind}DecoderLayer", f"{kind}RMSNorm"} <= changed


@pytest.mark.parametrize(("rows", "padding"), [(3, 4), (1, 0)], ids=["three rows, padding", "one row"])
@pytest.mark.parametrize("name", OTHERS)
@torch.no_grad()
def test_a_step_of_what_is_not_listed_is_that_of_transformers(name, rows, padding):
    model = model_of(name, torch.float32)
    actual, expected, changed = steps(model, rows, padding, unwritten=0.0)
    assert_close(actual, expected, torch.float32)
    routed = {type(x).__name__ for x in model.modules() if "has_gate" in vars(x)}
    assert routed and routed <= changed and all(kind.endswith("Norm") for kind in changed - routed)


@pytest.mark.parametrize("name", ["olmoe", "granitemoe", "deepseek_v2", "llama"])
@torch.no_grad()
def test_a_prompt_of_many_tokens_is_that_of_transformers(name):
    model = model_of(name, torch.float32)
    ids = torch.randint(3, 100, (3, 23), device=DEVICE)  # more tokens than a step has
    model.set_experts_implementation("eager")
    expected = model(ids).logits
    with fused_model(model, ids.numel()) as methods:
        assert methods
        assert_close(model(ids).logits, expected, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "padding"), [(3, 4), (1, 0)], ids=["three rows, padding", "one row"])
@pytest.mark.parametrize("name", [*CASES, *GRAFTS, *OTHERS])
@torch.no_grad()
def test_a_step_in_bf16(name, rows, padding):
    every = {"num_experts_per_tok": EXPERTS}  # rounding may then choose no others
    if name in ("deepseek_v2", "deepseek_v3", "glm4_moe_lite"):
        every["topk_group"] = 2
    assert_close(*steps(model_of(name, torch.bfloat16, **every), rows, padding, 0.0)[:2], torch.bfloat16)


# ---- what the kernels don't compute ----


@pytest.mark.parametrize(
    ("name", "fields", "kind"),
    [
        ("olmoe", {"clip_qkv": 0.5}, "OlmoeAttention"),
        ("mixtral", {"hidden_act": "mish"}, "MixtralSparseMoeBlock"),
    ],
)
@torch.no_grad()
def test_what_the_kernels_do_not_compute_stays_as_it_is(name, fields, kind):
    model = model_of(name, torch.float32, **fields)
    actual, expected, changed = steps(model, 2, 0, unwritten=0.0)
    assert_close(actual, expected, torch.float32)
    assert kind not in changed and kind in {type(x).__name__ for x in model.modules()}
