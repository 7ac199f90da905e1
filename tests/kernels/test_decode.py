"""The kernels of a decoding step against the modules whose place they take; on the CPU by Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from hf_moe import HfMoeForCausalLM
from hf_moe.kernels.decode import fused, routers
from hf_moe.kernels.tiles import SHARED_MEMORY

from .steps import DEVICE, LATENT, model_of, steps_of, tiny

ROOT = Path(__file__).parents[2]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}


ALL = {"num_experts_per_tok": 6}  # of six: rounding may then choose no other experts


MODELS = {
    "mla, softmax_topk, shared": LATENT | {"n_shared_experts": 2, "router_type": "softmax_topk"},
    "mla, q_lora, sigmoid and bias": LATENT
    | {"q_lora_rank": 20, "router_type": "sigmoid_topk", "router_args": {"selection_bias": True}}
    | {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "rope_interleave": True},
    "mla, groups, soft-cap": LATENT | {"n_group": 3, "topk_group": 2, "attn_logit_softcapping": 5.0},
    "gqa, topk_softmax, dense first": {"router_type": "topk_softmax", "mlp_layer_types": ["dense", "sparse"]}
    | {"num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "gqa, norm a head, window": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 6, "qk_norm": "head"}
    | {"sliding_window": 2, "rope_interleave": True},
    "mha, norm of all heads": {"num_attention_heads": 5, "qk_norm": "projection", "attn_logit_softcapping": 5.0},
    "mla, norm on sparse output": LATENT | {"sparse_output_norm": True, "n_shared_experts": 1},
    "gqa, plain MLP with biases": {
        "gated_mlp": False,
        "mlp_bias": True,
        "hidden_act": "gelu",
        "num_attention_heads": 4,
    },
    "gqa, clamped gates, shared": {"experts_swiglu_limit": 0.05, "n_shared_experts": 1, "num_attention_heads": 4},
    "gqa, one expert a token": {"num_experts_per_tok": 1, "num_attention_heads": 4, "hidden_act": "gelu_pytorch_tanh"},
}


MANY = ("mla, softmax_topk, shared", "gqa, topk_softmax, dense first", "gqa, plain MLP with biases")
DRAFTS = {"mla, softmax_topk, shared": 3, "gqa, norm a head, window": 3, "mha, norm of all heads": 0}  # padding
ONE, SEVERAL = (1, 1), (3, 2)  # tokens of two steps


def cases():
    """Of a few rows the kernels are others than of one more."""
    for name in MODELS:
        for rows in (1, 3, 5)[: 3 if name in MANY or DEVICE == "cuda" else 2]:
            padding = 3 * ("mla" in name or "norm" in name)
            yield pytest.param(name, torch.float32, padding, rows, ONE, id=f"{name}, {rows}")
            if DEVICE == "cuda":  # the interpreter multiplies the bits of bfloat16, and takes its time
                yield pytest.param(name, torch.bfloat16, 3, rows, ONE, id=f"{name}, {rows}, bf16")
                yield pytest.param(name, torch.bfloat16, 3, rows, SEVERAL, id=f"{name}, {rows}, drafts, bf16")
    yield pytest.param(MANY[0], torch.float32, 0, 3, ONE, id=f"{MANY[0]}, no padding")
    for name, padding in DRAFTS.items():
        for rows in (1, 2):
            yield pytest.param(name, torch.float32, padding, rows, SEVERAL, id=f"{name}, {rows}, drafts")
    if DEVICE == "cuda":
        yield from (pytest.param(name, torch.float16, 3, 3, ONE, id=f"{name}, fp16") for name in list(MODELS)[1:4:2])


@pytest.mark.parametrize(("name", "dtype", "padding", "rows", "steps"), list(cases()))
@torch.no_grad()
def test_a_step_with_the_kernels_is_the_step_of_the_modules(name, dtype, padding, rows, steps):
    all_experts = ALL if dtype == torch.bfloat16 and "groups" not in name else {}
    model = model_of(MODELS[name] | all_experts, dtype)
    expected, actual = steps_of(model, padding, rows, steps)
    tolerance = TOLERANCE[dtype] * float(expected.float().abs().max())
    torch.testing.assert_close(actual.float(), expected.float(), rtol=0, atol=tolerance)
    assert all("forward" not in vars(module) for module in model.modules())


UNKNOWN = {
    "norm after RoPE": ({"qk_norm": "head_after_rope"}, "HfMoeAttention"),
    "norm without a weight": ({"qk_norm": "l2"}, "HfMoeAttention"),
    "clipped": ({"clip_qkv": 0.5}, "HfMoeAttention"),
    "sinks": ({"attention_sinks": True}, "HfMoeAttention"),
    "norm on sparse output": ({"sparse_output_norm": True}, "HfMoeDecoderLayer"),
    "norms on outputs": ({"layer_norm_placement": "post"}, "HfMoeDecoderLayer"),
}


@pytest.mark.parametrize(("fields", "kind"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_the_kernels_do_not_compute_stays_as_it_is(fields, kind):
    """They would leave out a norm, or a clamp."""
    for config, changed in ((tiny(num_attention_heads=4), True), (tiny(num_attention_heads=4, **fields), False)):
        model = HfMoeForCausalLM(config)
        with fused(model, 1):
            found = {"forward" in vars(x) for x in model.modules() if type(x).__name__ == kind}
        assert found == {changed}


PROMPT_CASES = [
    pytest.param(name, torch.float32, id=name)
    for name in ("mla, softmax_topk, shared", "gqa, norm a head, window", "mha, norm of all heads")[
        : 3 if DEVICE == "cuda" else 2
    ]
]
if DEVICE == "cuda":
    PROMPT_CASES += [pytest.param(name, torch.bfloat16, id=f"{name}, bf16") for name in MODELS if "groups" not in name]


@pytest.mark.parametrize(("name", "dtype"), PROMPT_CASES)
@torch.no_grad()
def test_a_prompt_with_the_kernels_is_the_prompt_of_the_modules(name, dtype):
    model = model_of(MODELS[name] | (ALL if dtype == torch.bfloat16 else {}), dtype)
    ids = torch.randint(1, 37, (3, 23), device=DEVICE)  # more tokens than a step has
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    expected = model(ids, attention_mask=mask).logits
    with fused(model, ids.numel()) as methods:
        assert methods
        actual = model(ids, attention_mask=mask).logits
    tolerance = TOLERANCE[dtype] * float(expected.float().abs().max())
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], rtol=0, atol=tolerance)


@pytest.mark.parametrize("tokens", [1, 3])
def test_routers_logits_are_rounded_where_a_linear_layers_are(tokens):
    torch.manual_seed(0)
    x, change = torch.randn(2, tokens, 40, device=DEVICE, dtype=torch.float16)
    weight = torch.randn(11, 40, device=DEVICE, dtype=torch.float16)
    norm = torch.rand(40, device=DEVICE, dtype=torch.float16) + 0.5
    arguments, arrived = (
        (weight, None, 4, "softmax_topk", True, 1.5),
        torch.zeros(tokens, dtype=torch.int32).to(DEVICE),
    )
    _, normed, *of_both = routers.normed_route(x, change, norm, 1e-6, *arguments, True, arrived)
    exact, (logits, *alone) = routers.route(normed, *arguments, False), routers.route(normed, *arguments, True)
    assert torch.equal(logits, exact[0].half().float()) and not torch.equal(logits, exact[0])
    expected = logits.softmax(-1).topk(4).values
    for weights, index in (of_both, alone):
        torch.testing.assert_close(weights, 1.5 * expected / expected.sum(-1, keepdim=True), rtol=1e-5, atol=0)
        assert torch.equal(logits.gather(1, index), logits.topk(4).values)
    assert not arrived.any()


def test_a_steps_kernels_compile_for_a_card_that_is_not_here():
    """The interpreter lets pass what the compiler refuses, and what it warns of."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error:TRITON_DEFAULT_FP_FUSION", "-m", "tests.kernels.compile_worker"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    memory = json.loads(done.stdout.splitlines()[-1])
    assert {name.split(".")[0] for name in memory} >= {"few_tokens", "experts", "grouped", "latent", "routers"}
    assert max(memory.values()) <= SHARED_MEMORY
