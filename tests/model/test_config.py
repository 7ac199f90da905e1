import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, GenerationConfig

from hf_moe import HfMoeConfig
from tests.conftest import tiny_config


def test_defaults_follow_from_other_fields():
    config = HfMoeConfig(hidden_size=96, num_attention_heads=4, intermediate_size=33, num_hidden_layers=2)
    assert config.head_dim == 24
    assert config.num_key_value_heads == 4
    assert config.moe_intermediate_size == config.shared_expert_intermediate_size == 33
    assert config.layer_types == ["full_attention"] * 2
    assert config.mlp_layer_types == ["sparse"] * 2
    assert HfMoeConfig(num_hidden_layers=1, sliding_window=8).layer_types == ["sliding_attention"]


@pytest.mark.parametrize("name", ["num_local_experts", "n_routed_experts"])
def test_other_families_name_for_the_experts(name):
    assert HfMoeConfig(**{name: 5}).num_experts == 5
    assert getattr(tiny_config(), name) == 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 9}, r"num_experts_per_tok \(9\) must be between 1 and num_experts \(7\)"),
        ({"num_experts_per_tok": 0}, r"num_experts_per_tok \(0\)"),
        ({"num_key_value_heads": 4}, r"num_attention_heads \(6\) must be a multiple of num_key_value_heads \(4\)"),
        ({"n_group": 2}, r"num_experts \(7\) must be a multiple of n_group \(2\)"),
        ({"n_group": 7, "topk_group": 8}, r"topk_group \(8\)"),
        ({"n_group": 7, "topk_group": 2}, r"num_experts_per_tok \(3\) exceeds the 2 experts"),
        ({"router_type": "magic"}, r"'magic' is unknown; the routers are \['base', "),
        ({"router_args": {"temperature": 2}}, r"\['temperature'\] are unknown to 'softmax_topk'"),
        ({"router_args": {"group_score": "worst"}}, r"\['two_best', 'best'\]"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window is None"),
        ({"layer_types": ["linear_attention"] * 3}, r"has \['linear_attention'\]"),
        ({"mlp_layer_types": ["sparse"]}, r"num_hidden_layers` \(3\)"),
        ({"num_attention_heads": 0}, r"num_attention_heads \(0\) must be at least 1"),
        ({"n_group": 0}, r"n_group \(0\) must be at least 1"),
        ({"n_shared_experts": -1}, r"n_shared_experts \(-1\) must be at least 0"),
        ({"router_aux_loss_coef": -0.1}, r"router_aux_loss_coef \(-0.1\) must be at least 0"),
        ({"final_logit_softcapping": 0}, r"final_logit_softcapping \(0\) must be above 0, or None"),
        ({"hidden_act": "magic"}, "hidden_act 'magic' is unknown; Transformers has .*silu"),
        ({"rope_parameters": {"rope_type": "magic"}}, "rope_type 'magic' is unknown; Transformers has .*yarn"),
        ({"rope_parameters": {"full_attention": {"rope_type": "magic"}}}, "rope_type 'magic' is unknown"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_contradictions_name_the_numbers(changes, message):
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        tiny_config(**changes)


def test_a_wrong_type_names_the_field():
    with pytest.raises(StrictDataclassFieldValidationError, match="num_experts"):
        tiny_config(num_experts="many")


def test_round_trip_through_a_folder(tmp_path):
    config = tiny_config(router_type="sigmoid_topk", router_args={"selection_bias": True}, provenance={"source": "x"})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is HfMoeConfig
    assert loaded.to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize("name", ["text_config", "decoder"])
def test_it_is_its_own_text_config_whatever_else_is_said(name):
    config = HfMoeConfig(**{name: True})
    assert config.get_text_config() is config.get_text_config(decoder=True) is config
    GenerationConfig.from_model_config(config)
