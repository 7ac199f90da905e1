"""Tensor, expert and data parallelism of Transformers on two CPU processes give one process's logits and gradients."""

import pytest
import torch

from hf_moe import HfMoeGraftConfig, HfMoeGraftForCausalLM
from hf_moe.model.parallel_plans import in_all_layers
from tests import picture_families
from tests.conftest import tiny_model
from tests.dense_families import FAMILIES, config_of
from tests.picture_families import PICTURES
from tests.processes import on_two_processes

EVEN = {"vocab_size": 98, "num_experts": 6}  # what is split between two ranks must be even
MODELS = {
    "gated": {"n_shared_experts": 1, "num_mtp_layers": 1},
    "plain-projection-norm": {"gated_mlp": False, "hidden_act": "gelu", "qk_norm": "projection"},
    "biases": {"mlp_bias": True, "attention_bias": True, "attention_output_bias": True, "n_shared_experts": 1},
    "heads": {"attention_type": "moa"},
    "norms-after": {"qk_norm": "head_after_rope", "sparse_output_norm": True, "n_shared_experts": 1},
    "sandwich-scaled-inputs": {
        **{"layer_norm_placement": "sandwich", "rms_norm_unit_offset": True, "qk_norm": "l2"},
        **{"embedding_multiplier": 3.0, "residual_multiplier": 0.7, "expert_input_scaling": True},
    },
    "sinks-clamped": {"attention_sinks": True, "experts_swiglu_limit": 0.5, "router_args": {"router_bias": True}},
    "latent": {
        "attention_type": "mla",
        "num_key_value_heads": None,
        "q_lora_rank": 11,
        "kv_lora_rank": 13,
        "qk_nope_head_dim": 5,
        "qk_rope_head_dim": 6,
        "v_head_dim": 7,
    },
}
# Hosts: gate and up in one matrix, biases and parallel blocks, sandwich norms, state spaces, one without a plan.
GRAFTS = {
    "phi3": {},
    "phi": {},
    "gemma3_text": {"n_shared_experts": 1, "sparse_layers": [0, 2]},
    "qwen3_5_text": {"n_shared_experts": 2},
    "falcon_h1": {},
    "stablelm": {},
}


def graft(model_type: str, **fields) -> HfMoeGraftForCausalLM:
    torch.manual_seed(0)
    backbone = picture_families.config_of(model_type) if model_type in PICTURES else config_of(model_type)
    return HfMoeGraftForCausalLM(HfMoeGraftConfig(backbone=backbone, num_experts=4, **fields))


@pytest.mark.parametrize("name", MODELS)
def test_every_rule_of_a_plan_matches_something(name):
    model = tiny_model(**EVEN, **MODELS[name])
    rules = model.config.base_model_tp_plan | model.config.base_model_ep_plan
    assert matching(model.model, rules) == set(rules)


@pytest.mark.parametrize("name", [*FAMILIES, *PICTURES])
def test_every_rule_of_a_grafts_plan_matches_something(name):
    with torch.device("meta"):
        model = graft(name, n_shared_experts=1)
        host = model.host_class._from_config(model.config.backbone)
    rules = model.tp_plan | model.ep_plan
    assert matching(model, rules) == set(rules)
    assert model.tp_plan.items() >= {rule: host.tp_plan[rule] for rule in matching(model, host.tp_plan)}.items()
    whole = name in ("apertus", "apertus1p5_text", "bitnet")  # their experts share what they learn
    assert ("ep_dispatch_experts" in model.ep_plan.values()) is not whole
    assert whole or any("shared_experts" in rule for rule in model.tp_plan)


def matching(model, rules) -> set[str]:
    return {in_all_layers(name) for name, _ in [*model.named_modules(), *model.named_parameters()]} & rules.keys()


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    for name, changes in MODELS.items():
        tiny_model(**EVEN, **changes).save_pretrained(folder / name)
    for name, fields in GRAFTS.items():
        graft(name, **fields).save_pretrained(folder / name)
    return on_two_processes("model/parallel_worker.py", str(folder))


@pytest.mark.parametrize("layout", ["tensor-parallel", "tensor-and-expert-parallel", "expert-parallel", "fsdp"])
@pytest.mark.parametrize("name", [*MODELS, *GRAFTS])
def test_equals_one_process(differences, name, layout):
    assert differences[f"{name}/{layout}"] == pytest.approx(
        dict.fromkeys(differences[f"{name}/{layout}"], 0), abs=1e-4
    )
