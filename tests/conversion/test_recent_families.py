"""The families of 2025 and 2026: what their releases say and hold beside what Transformers' class reads."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_moe.conversion import export_checkpoint, import_checkpoint
from hf_moe.conversion.families import FAMILIES
from hf_moe.conversion.known_config import find_config
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from hf_moe import HfMoeConfig
from tests.conftest import since, tokens
from tests.conversion.conftest import SIZES, check_import_refused
from tests.conversion.recent_cases import CASES, YARN

has_sarvam = since(24, "has no Sarvam")

V3_KEYS = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
# Keys of the releases' config.json that Transformers' class does not declare.
SAID = {
    "glm4_moe_lite": {**V3_KEYS, "first_k_dense_replace": 1, "partial_rotary_factor": 1.0},
    "solar_open": {"first_k_dense_replace": 0, "use_qk_norm": False, "partial_rotary_factor": 1.0},
    "dots1": V3_KEYS,
    "exaone_moe": V3_KEYS,
    "hy_v3": {"qk_norm": True, "route_norm": True, "first_k_dense_replace": 1, "expert_hidden_dim": 20},
    "sarvam_mla": V3_KEYS,
    "granitemoe_swa": {"layer_rope_theta": [77.0, 0, 77.0]},
    "hunyuan_v1_moe": {"use_qk_norm": True, "use_mixed_mlp_moe": True, "use_cla": False, "num_shared_expert": 1},
}


@pytest.mark.parametrize("case", [case for case in SAID if case in FAMILIES])
def test_what_the_release_says_is_read_and_written(case, checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint(case), tmp_path / "source"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | SAID[case]))
    report = import_checkpoint(folder, tmp_path / "moe", progress=False)
    assert report["max_abs_diff"] <= 1e-5
    assert not set(report["ignored_config_keys"]) & set(SAID[case])
    export_checkpoint(tmp_path / "moe", tmp_path / "back", to=case, verify=False, progress=False)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: written.get(name, written["rope_parameters"].get(name)) for name in SAID[case]} == SAID[case]


@has_sarvam
def test_a_sarvam_says_its_own_class(checkpoint, tmp_path):
    """Which is another's in Transformers: programs go by the name, and its tensors have names of their own."""
    import_checkpoint(checkpoint("sarvam_moe"), tmp_path / "moe", verify=False, progress=False)
    export_checkpoint(tmp_path / "moe", tmp_path / "back", to="sarvam_moe", progress=False)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written["architectures"] == ["SarvamMoEForCausalLM"]
    names = load_file(tmp_path / "back" / "model.safetensors").keys()
    assert {"model.word_embeddings.weight", "model.layers.1.attention.query_key_value.weight"} <= names


MTP = {
    "ernie4_5_moe": "model.mtp_linear_proj.0.weight",
    "exaone_moe": "mtp.fc.weight",
    "mellum": "mtp.fc.weight",
}


@pytest.mark.parametrize(("case", "name"), MTP.items(), ids=MTP)
def test_multi_token_prediction_of_another_kind_is_left_out_where_asked(case, name, checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint(case), tmp_path / "source"))
    weights = load_file(folder / "model.safetensors") | {name: torch.ones(24, 48)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"holds {name}: hf_moe cannot carry.*{case}.*--drop-mtp"):
        import_checkpoint(folder, tmp_path / "moe", progress=False)
    report = import_checkpoint(folder, tmp_path / "moe", drop_mtp=True, progress=False)
    assert report["max_abs_diff"] <= 1e-5
    import_checkpoint(checkpoint(case), tmp_path / "plain", verify=False, progress=False)
    ours, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "plain"))
    assert ours.keys() == plain.keys()
    for other in ours:
        assert torch.equal(ours[other], plain[other]), other


VISION = {
    "qwen3_vl_moe": {
        **{"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 24},
        **{"patch_size": 2, "num_position_embeddings": 4, "deepstack_visual_indexes": [0]},
    },
    "aria": {
        **{"model_type": "idefics3_vision", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "image_size": 4, "patch_size": 2},
    },
}
LANGUAGE = {
    "qwen3_vl_moe": {
        **{"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "head_dim": 10},
        **{"mlp_only_layers": [1], "attention_bias": True, "router_aux_loss_coef": 0.03},
        "rope_parameters": {**YARN, "mrope_section": [2, 2, 1], "mrope_interleaved": True},
    },
    "aria": CASES["aria_text"][1],
}


def seeing(whole: str):
    config = AutoConfig.for_model(whole, text_config={**SIZES, **LANGUAGE[whole]}, vision_config=VISION[whole])
    torch.manual_seed(3)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize(("whole", "alone"), [("qwen3_vl_moe", "qwen3_moe"), ("aria", "aria_text")])
def test_the_language_model_of_one_that_sees_pictures(whole, alone, tmp_path):
    """Its logits on text, and those of what it is exported as; it cannot be compared on the way."""
    model = seeing(whole)
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"does not load the language model alone.*--no-verify"):
        import_checkpoint(tmp_path / "whole", tmp_path / "moe", progress=False)
    report = import_checkpoint(tmp_path / "whole", tmp_path / "moe", verify=False, progress=False)
    assert report["ignored_config_keys"] == []
    report = export_checkpoint(tmp_path / "moe", tmp_path / "alone", to=alone, progress=False)
    assert report["max_abs_diff"] <= 1e-5
    ids = tokens(length=23, vocab_size=61)
    with torch.inference_mode():
        expected = model(input_ids=ids).logits
        for name in ("moe", "alone"):
            found = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()(ids).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_the_experts_of_a_qwen3_vl_as_released_lie_transposed(tmp_path):
    """Under the same names as those that Transformers writes; the shapes tell which they are."""
    seeing("qwen3_vl_moe").save_pretrained(tmp_path / "saved")
    shutil.copytree(tmp_path / "saved", tmp_path / "released")
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    experts = {name: x.mT.contiguous() for name, x in weights.items() if ".experts." in name}
    assert experts
    save_file(weights | experts, tmp_path / "released" / "model.safetensors", metadata={"format": "pt"})
    for name in ("saved", "released"):
        import_checkpoint(tmp_path / name, tmp_path / f"{name}-moe", verify=False, progress=False)
    saved, released = (tmp_path / f"{name}-moe" / "model.safetensors" for name in ("saved", "released"))
    assert saved.read_bytes() == released.read_bytes()


def test_kimi_k2_is_a_deepseek_v3_under_another_name(checkpoint, tmp_path):
    """Transformers' class of V3 reads what is exported, told so; its weights and logits are the source's."""
    folder = Path(shutil.copytree(checkpoint("deepseek_v3"), tmp_path / "source"))
    config = json.loads((folder / "config.json").read_text())
    said = {"model_type": "kimi_k2", "aux_loss_alpha": 0.001, "seq_aux": True, **V3_KEYS}
    (folder / "config.json").write_text(json.dumps(config | said | {"ep_size": 1}))
    assert find_config(str(folder))[0].kv_lora_rank == 14
    with pytest.raises(ValueError, match=r"no class for kimi_k2.*--no-verify"):
        import_checkpoint(folder, tmp_path / "moe", progress=False)
    report = import_checkpoint(folder, tmp_path / "moe", verify=False, progress=False)
    assert report["ignored_config_keys"] == []
    export_checkpoint(tmp_path / "moe", tmp_path / "back", to="kimi_k2", verify=False, progress=False)
    written, read = (load_file(path / "model.safetensors") for path in (tmp_path / "back", folder))
    assert written.keys() == read.keys()
    for name, weight in written.items():
        assert torch.equal(weight, read[name]), name
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: config[name] for name in said} == pytest.approx(said)
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]

    (tmp_path / "back" / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v3"}))
    ids = tokens(length=23, vocab_size=61)
    with torch.inference_mode():
        expected, *found = (
            AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits
            for path in (checkpoint("deepseek_v3"), tmp_path / "back", tmp_path / "moe")
        )
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_an_axk1_as_released(checkpoint, tmp_path):
    """Without the bias, which its config says and is one of 0; with a norm for dense layers that nothing reads."""
    folder = Path(shutil.copytree(checkpoint("axk1"), tmp_path / "source"))
    zeros = Path(shutil.copytree(folder, tmp_path / "zeros"))
    weights = load_file(folder / "model.safetensors")
    biases = {name: torch.zeros_like(x) for name, x in weights.items() if name.endswith("e_score_correction_bias")}
    kept = {name: x for name, x in weights.items() if name not in biases}
    assert biases
    save_file(weights | biases, zeros / "model.safetensors", metadata={"format": "pt"})
    unread = "model.layers.0.post_mlp_layernorm.weight"
    save_file({**kept, unread: torch.ones(24)}, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"topk_method": "greedy"}))
    import_checkpoint(folder, tmp_path / "moe", verify=False, progress=False)
    ids = tokens(length=23, vocab_size=61)
    with torch.inference_mode():
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(path).eval()(ids).logits for path in (tmp_path / "moe", zeros)
        )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    export_checkpoint(tmp_path / "moe", tmp_path / "back", to="axk1", verify=False, progress=False)
    written = load_file(tmp_path / "back" / "model.safetensors")
    assert written.keys() == kept.keys()
    for name, weight in written.items():
        assert torch.equal(weight, kept[name]), name
    assert json.loads((tmp_path / "back" / "config.json").read_text())["topk_method"] == "greedy"


@pytest.mark.parametrize(
    ("part", "match"),
    [
        ("gate_up_proj_bias", r"gate_up_proj_bias is not 0, but the family has no place for it"),
        ("down_proj_bias", r"down_proj_bias differs between experts, which have one model\.layers\.1\.mlp\.bias"),
    ],
)
def test_a_jetmoe_whose_experts_have_biases_of_their_own_by_now(part, match, checkpoint, tmp_path):
    import_checkpoint(checkpoint("jetmoe"), tmp_path / "moe", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    with torch.no_grad():
        getattr(model.model.layers[1].mlp.experts, part)[3, 2] += 1
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(ValueError, match=match):
        export_checkpoint(tmp_path / "trained", tmp_path / "back", to="jetmoe", progress=False)
    assert not (tmp_path / "back").exists()


def test_the_layers_of_an_exaone_that_rotate():
    config = FAMILIES["exaone_moe"].config_class(num_hidden_layers=5, sliding_window=128, sliding_window_pattern=4)
    fields = HfMoeConfig(**FAMILIES["exaone_moe"].hf_moe_fields(config))
    assert fields.no_rope_layers == [1, 1, 1, 0, 1]
    assert fields.layer_types[3] == "full_attention"


@pytest.mark.parametrize(
    ("thetas", "rope"),
    [
        ([10.0, 10.0, 10.0, 10.0], {"rope_type": "default", "rope_theta": 10.0}),
        ([0, 10.0, 10.0, 10.0], {"rope_type": "default", "rope_theta": 10.0}),
        ([0, 0, 0, 0], {"rope_type": "default", "rope_theta": 77.0}),
        (
            [5.0, 10.0, 0, 10.0],
            {
                "full_attention": {"rope_type": "default", "rope_theta": 5.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
            },
        ),
    ],
)
def test_the_thetas_of_a_granite_with_windows(thetas, rope):
    family = FAMILIES["granitemoe_swa"]
    said = {"rope_type": "default", "rope_theta": 77.0}
    fields = family.hf_moe_fields(
        family.config_class(num_hidden_layers=4, layer_rope_theta=thetas, rope_parameters=said)
    )
    assert fields["rope_parameters"] == rope
    assert fields["no_rope_layers"] == [int(theta > 0) for theta in thetas]


HALF = {"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": 0.5}
REFUSED = {
    "biases of MLPs alone": ("ernie4_5_moe", {"use_bias": True}, "use_bias=True"),
    "another least sum": ("ernie4_5_moe", {"moe_norm_min": 0.1}, "moe_norm_min=0.1"),
    "part of RoPE": ("solar_open", {"rope_parameters": HALF}, "partial_rotary_factor=0.5"),
    "part of a latent's RoPE": ("glm4_moe_lite", {"rope_parameters": HALF}, "partial_rotary_factor=0.5"),
    "leading dense layers": ("solar_open", {"first_k_dense_replace": 1}, "first_k_dense_replace=1"),
    "norms": ("solar_open", {"use_qk_norm": True}, "use_qk_norm=True"),
    "softmax scores": ("dots1", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
    "no shared experts of dots1": ("dots1", {"n_shared_experts": 0}, "n_shared_experts=0"),
    "no shared experts of exaone": ("exaone_moe", {"num_shared_experts": 0}, "num_shared_experts=0"),
    "a latent's other rank": ("glm4_moe_lite", {"kv_lora_rank": 12}, r"kv_a_proj_with_mqa.* \[20, 24\].* \[18, 24\]"),
    "fewer experts": ("flex_olmo", {"num_experts": 4}, r"holds model\.layers\.0\.mlp\.experts\.4"),
    "part of RoPE in a layer type": (
        "mellum",
        {"rope_parameters": {"full_attention": HALF, "sliding_attention": HALF}},
        "partial_rotary_factor=0.5",
    ),
    "biases of hy's MLPs alone": ("hy_v3", {"mlp_bias": True}, "mlp_bias=True"),
    "weights as they are": ("hy_v3", {"route_norm": False}, "route_norm=False"),
    "no shared experts of hy": ("hy_v3", {"num_shared_experts": 0}, "num_shared_experts=0"),
    "fewer experts of flint": ("flint", {"num_experts": 4}, r"holds model\.layers\.1\.mlp\.experts\.4"),
    "another q of sarvam": ("sarvam_moe", {"num_key_value_heads": 1}, r"query_key_value.* \[64, 24\].* \[48, 24\]"),
    "softmax scores of sarvam": ("sarvam_mla", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
    "another activation of aria": ("aria_text", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    "biases of aria's shared experts": ("aria_text", {"mlp_bias": True}, "mlp_bias=True"),
    "fewer experts of aria": ("aria_text", {"moe_num_experts": 4}, r"router.* \[5, 24\].* \[4, 24\]"),
    "experts a token by layer": ("hunyuan_v1_moe", {"moe_topk": [3, 2, 3]}, r"moe_topk=\[3, 2, 3\]"),
    "another width of hunyuan": ("hunyuan_v1_moe", {"moe_intermediate_size": [20] * 3}, "moe_intermediate_size=20"),
    "two shared experts": ("hunyuan_v1_moe", {"num_shared_expert": [2] * 3}, "num_shared_expert=2"),
    "attention across layers": ("hunyuan_v1_moe", {"use_cla": True}, "use_cla=True"),
    "another eps of the last norm": ("jetmoe", {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05 cannot be carried"),
    "softmax scores of axk1": ("axk1", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
    "thetas within a layer type": ("granitemoe_swa", {"layer_rope_theta": [1.0, 2.0, 3.0]}, "layer_rope_theta="),
    "part of RoPE in windows": ("granitemoe_swa", {"rope_parameters": HALF}, "partial_rotary_factor=0.5"),
}


KNOWN = {name: row for name, row in REFUSED.items() if row[0] in FAMILIES}  # older hosts have fewer


@pytest.mark.parametrize(("case", "changes", "match"), KNOWN.values(), ids=KNOWN)
def test_refuses(case, changes, match, checkpoint, tmp_path):
    check_import_refused(checkpoint(case), changes, match, tmp_path / case)


@pytest.mark.parametrize("model_type", ["qwen3_next", "deepseek_v32", "jamba", "minimax"])
def test_a_family_that_is_not_rewritten_is_refused_with_what_trains_it(model_type, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    command = "hf-moe train tiny/sft --model_name_or_path model --train_data"
    with pytest.raises(ValueError, match=rf"is a {model_type}, whose layers.*{command}") as raised:
        import_checkpoint(folder, tmp_path / "moe", progress=False)
    assert "\n" not in str(raised.value)
