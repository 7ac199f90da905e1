"""Export: the tables read backwards give back what was imported, and refuse what a family cannot hold."""

import json
import shutil
from pathlib import Path

import jinja2
import pytest
import torch
from hf_moe.conversion import export_checkpoint, import_checkpoint, nearest_families, upcycle
from hf_moe.conversion.computation import READ_IF, TRAINING_FIELDS, computation
from hf_moe.conversion.families import FAMILIES
from hf_moe.conversion.nearest_families import family_config, fits
from hf_moe_cli import main
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_moe import HfMoeConfig
from tests.conftest import tiny_config, tiny_model, tokens
from tests.conversion.conftest import DEEPSEEK_CASES, MOE_CASES, build
from tests.conversion.test_deepseek import V1, V1_CASES, v1_checkpoint

CASES = {**MOE_CASES, **DEEPSEEK_CASES}
LAYOUTS = {"per-expert": {}, "fused": {"save_original_format": False}}
GREEDY = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, weight in a.items():
        assert weight.dtype == b[name].dtype, name
        assert torch.equal(weight, b[name]), name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_round_trip(case, layout, checkpoint, tmp_path):
    """Imported and exported: every tensor bit for bit, and a config that the family reads as before."""
    family = CASES[case][0]
    source = checkpoint(case, **LAYOUTS[layout])
    import_checkpoint(source, tmp_path / "moe", verify=False, progress=False)
    report = export_checkpoint(
        tmp_path / "moe",
        tmp_path / "back",
        to=family,
        layout=layout,
        max_shard_size="9KB",
        verify=False,
        progress=False,
    )
    same_weights(weights_of(tmp_path / "back"), weights_of(source))
    assert report["training_fields"] == {}
    assert not list((tmp_path / "back").glob("*.py"))
    assert "auto_map" not in (tmp_path / "back" / "config.json").read_text()

    before, after = (AutoConfig.from_pretrained(folder).to_dict() for folder in (source, tmp_path / "back"))
    changed = {name for name in before if before[name] != after[name]} - {"_name_or_path"}
    # Two spellings of the same layers, of a default head_dim, or of no window or group.
    spellings = {"decoder_sparse_step", "mlp_only_layers", "max_window_layers", "head_dim", "n_group", "topk_group"}
    assert changed <= spellings
    first, second = (
        HfMoeConfig(**FAMILIES[family].hf_moe_fields(AutoConfig.from_pretrained(folder))).to_dict()
        for folder in (source, tmp_path / "back")
    )
    assert first == second


@pytest.mark.parametrize("case", V1_CASES)
def test_v1_round_trip(case, tmp_path):
    config = V1 | V1_CASES[case]
    weights = v1_checkpoint(tmp_path / "v1", config)
    import_checkpoint(tmp_path / "v1", tmp_path / "moe", verify=False, progress=False)

    def export():
        export_checkpoint(tmp_path / "moe", tmp_path / "back", to="deepseek", verify=False, progress=False)

    if config["num_experts_per_tok"] == 1:  # the release does not normalise one weight, and says that it does
        config["norm_topk_prob"] = False
    if config["moe_layer_freq"] > 1:
        with pytest.raises(ValueError, match="deepseek cannot hold this model's mlp_layer_types="):
            export()
        return
    export()
    same_weights(weights_of(tmp_path / "back"), weights)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    rope = {"rope_type": "default"} | (config["rope_scaling"] or {})
    assert written["rope_parameters"]["rope_theta"] == config["rope_theta"]
    assert written["rope_parameters"].get("factor") == rope.get("factor")
    for name in config.keys() - {"auto_map", "rope_theta", "rope_scaling", "torch_dtype", "transformers_version"}:
        assert written[name] == pytest.approx(config[name]), name


UPCYCLED = {
    "llama to mixtral": ("llama", "mixtral"),
    "llama with its own head_dim to mixtral": ("llama-head_dim", "mixtral"),
    "mistral with a window to mixtral": ("mistral-window", "mixtral"),
    "qwen3 to qwen3_moe": ("qwen3", "qwen3_moe"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("case", "to"), UPCYCLED.values(), ids=UPCYCLED)
def test_upcycled_models_in_transformers_own_class(case, to, layout, checkpoint, tmp_path):
    dense = checkpoint(case)
    upcycle(dense, tmp_path / "moe", experts=5, top_k=2, router_std=0.5, verify=False, progress=False)
    model = load(tmp_path / "moe")
    with torch.no_grad():  # experts that differ, as after training
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.mul_(torch.rand(5, 1, 1) + 0.5)
    model.save_pretrained(tmp_path / "trained")
    report = export_checkpoint(tmp_path / "trained", tmp_path / to, to=to, layout=layout, progress=False)
    assert report["max_abs_diff"] <= 1e-4
    exported = load(tmp_path / to)
    assert type(exported).__module__.startswith("transformers.models.")
    assert report["total_params"] == exported.num_parameters()
    ids = tokens(length=23, vocab_size=61)
    with torch.inference_mode():
        torch.testing.assert_close(exported(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert torch.equal(exported.generate(ids, **GREEDY), model.generate(ids, **GREEDY))
    coefficient = exported.config.router_aux_loss_coef * exported.config.num_experts_per_tok
    assert coefficient == pytest.approx(model.config.router_aux_loss_coef)


def test_an_upcycled_granite_is_a_granitemoe(tmp_path):
    multipliers = {"attention_multiplier": 0.3, "embedding_multiplier": 3.0, "residual_multiplier": 0.7}
    build("granite", **multipliers, logits_scaling=2.5).save_pretrained(tmp_path / "dense")
    upcycle(tmp_path / "dense", tmp_path / "moe", experts=5, top_k=2, verify=False, progress=False)
    report = export_checkpoint(tmp_path / "moe", tmp_path / "out", to="granitemoe", progress=False)
    assert report["max_abs_diff"] <= 1e-5
    assert type(load(tmp_path / "out")).__name__ == "GraniteMoeForCausalLM"


@pytest.mark.parametrize("router", ["sqrtsoftplus_topk", "top_p", "expert_threshold", "relu", "null_experts"])
def test_routers_that_no_family_has_are_refused_by_name(router, tmp_path):
    tiny_model(router_type=router, mlp_layer_types=["sparse"] * 3).save_pretrained(tmp_path / "moe")
    with pytest.raises(ValueError, match=f"mixtral cannot hold this model's router_type='{router}'; none"):
        export_checkpoint(tmp_path / "moe", tmp_path / "out", to="mixtral")


def test_some_layers_dense_is_not_mixtral_but_qwen3_moe(checkpoint, tmp_path):
    upcycle(checkpoint("qwen3"), tmp_path / "moe", experts=3, top_k=2, layers="1", verify=False, progress=False)
    with pytest.raises(ValueError, match=r"mixtral cannot hold this model's qk_norm='head'; qwen3_moe can\."):
        export_checkpoint(tmp_path / "moe", tmp_path / "out", to="mixtral")
    export_checkpoint(tmp_path / "moe", tmp_path / "out", to="qwen3_moe", progress=False)
    assert load(tmp_path / "out").config.mlp_only_layers == [0, 2]


# Fields of a model like Mixtral, and where Mixtral cannot hold what becomes of it.
MIXTRAL_LIKE = {"mlp_layer_types": None, "router_type": "topk_softmax"}
UNHELD = {
    "attention_bias": ({"attention_bias": True}, "attention_bias=True"),
    "attention_output_bias": ({"attention_output_bias": True}, "attention_output_bias=True"),
    "qk_norm": ({"qk_norm": "projection"}, "qk_norm='projection'"),
    "clip_qkv": ({"clip_qkv": 3.0}, "clip_qkv=3.0"),
    "attn_logit_softcapping": ({"attn_logit_softcapping": 30.0}, "attn_logit_softcapping=30.0"),
    "final_logit_softcapping": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    "some layers slide": (
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 5},
        r"layer_types=\['full_attention', 'sliding_attention', 'full_attention'\]",
    ),
    "rope_interleave": ({"rope_interleave": True}, "rope_interleave=True"),
    "gated_mlp": ({"gated_mlp": False}, "gated_mlp=False; none"),
    "mlp_bias": ({"mlp_bias": True}, "mlp_bias=True; none"),
    "dense layers": ({"mlp_layer_types": ["dense", "sparse", "sparse"]}, "mlp_layer_types="),
    "shared experts": ({"n_shared_experts": 2}, "n_shared_experts=2; deepseek, granitemoeshared and aria_text can"),
    "sum of weights": ({"router_type": "softmax_topk"}, "norm_topk_prob=False; deepseek can"),
    "scores": ({"router_type": "sigmoid_topk", "norm_topk_prob": True}, "router_type='sigmoid_topk'; none"),
    "expert choice": ({"router_type": "expert_choice"}, "router_type='expert_choice'"),
    "scale": ({"routed_scaling_factor": 2.5}, "routed_scaling_factor=2.5; none"),
    "groups": ({"n_group": 7, "topk_group": 4}, "n_group=7; none"),
    "bias": ({"router_args": {"selection_bias": True}}, r"router_args=\{'selection_bias': True\}; none"),
    "jitter": ({"router_args": {"jitter": 0.1}}, r"router_args=\{'jitter': 0.1\}"),
    "part of RoPE": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": 0.5}},
        r"partial_rotary_factor=0\.5",
    ),
    "latent attention": (
        {
            **{"attention_type": "mla", "num_key_value_heads": 6, "kv_lora_rank": 8},
            **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
        },
        "attention_type='mla'",
    ),
    "layer norm": ({"norm_type": "layer_norm"}, "norm_type='layer_norm'; none"),
    "unit offset": ({"rms_norm_unit_offset": True}, "rms_norm_unit_offset=True"),
    "post-norm": ({"layer_norm_placement": "post"}, "layer_norm_placement='post'"),
    "embeddings": ({"embedding_multiplier": 3.0}, "embedding_multiplier=3.0; granitemoe and granitemoeshared can"),
    "attention scale": ({"attention_multiplier": 0.1}, "attention_multiplier=0.1; granitemoe and granitemoeshared"),
    "residuals": ({"residual_multiplier": 0.3}, "residual_multiplier=0.3; granitemoe"),
    "logits": ({"logits_scaling": 8}, "logits_scaling=8; granitemoe"),
    "sinks": ({"attention_sinks": True}, "attention_sinks=True"),
    "no RoPE": ({"no_rope_layers": [1, 0, 1]}, r"no_rope_layers=\[1, 0, 1\]"),
    "chunks": (
        {"layer_types": ["chunked_attention"] * 3, "attention_chunk_size": 4},
        "layer_types=.'chunked_attention'",
    ),
    "clamped experts": ({"experts_swiglu_limit": 7.0}, "experts_swiglu_limit=7.0"),
    "weighted inputs": ({"expert_input_scaling": True}, "expert_input_scaling=True"),
    "router's bias": ({"router_args": {"router_bias": True}}, r"router_args=\{'router_bias': True\}"),
    "multi-token prediction": ({"num_mtp_layers": 1}, "num_mtp_layers=1"),
}


@pytest.mark.parametrize(("changes", "match"), UNHELD.values(), ids=UNHELD)
def test_a_field_that_the_family_cannot_hold_is_refused_by_name(changes, match):
    family_config(FAMILIES["mixtral"], tiny_config(**MIXTRAL_LIKE))
    with pytest.raises(ValueError, match=match) as raised:
        family_config(FAMILIES["mixtral"], tiny_config(**{**MIXTRAL_LIKE, **changes}))
    assert "\n" not in str(raised.value)


def test_the_refusal_names_families_that_can():
    config = tiny_config(router_type="softmax_topk", qk_norm="projection", mlp_layer_types=None)
    with pytest.raises(ValueError, match=r"mixtral cannot hold this model's qk_norm='projection'; olmoe can\."):
        family_config(FAMILIES["mixtral"], config)


def test_families_that_can_hold_a_model_come_first():
    found = fits(tiny_config(**MIXTRAL_LIKE))
    assert {entry["family"] for entry in found} == set(FAMILIES)
    holding = [entry["family"] for entry in found if entry["holds"]]
    assert holding == ["mixtral", "deepseek", "granitemoe", "granitemoeshared"]
    assert [entry["family"] for entry in found][: len(holding)] == holding
    for entry in found[len(holding) :]:
        assert entry["field"] is None or f"{entry['field']}={entry['value']!r}"[:12] in entry["reason"]
        assert entry["family"] in entry["reason"]
    fields = {entry["family"]: (entry["field"], entry["value"]) for entry in found}
    assert fields["olmoe"] == ("qk_norm", None)
    assert fields["gpt_oss"] == ("attention_sinks", False)
    for entry in found:  # what is said is what export does
        if entry["holds"]:
            family_config(FAMILIES[entry["family"]], tiny_config(**MIXTRAL_LIKE))
        else:
            with pytest.raises(ValueError, match=entry["family"]):
                family_config(FAMILIES[entry["family"]], tiny_config(**MIXTRAL_LIKE))


SINKS_AND_BIASES = {"attention_sinks": True, "mlp_bias": True, "router_args": {"router_bias": True}}


@pytest.mark.parametrize(
    ("family", "changes", "field"),
    [
        ("dbrx", {"norm_type": "layer_norm"}, "clip_qkv"),
        ("gpt_oss", SINKS_AND_BIASES, "experts_swiglu_limit"),
        ("glm4_moe", {"router_type": "sigmoid_topk", "router_args": {"selection_bias": True}}, "n_shared_experts"),
        ("deepseek_v3", {}, "attention_type"),
        ("llama4_text", {}, "rope_interleave"),
        ("minimax_m2", {"qk_norm": "projection"}, "router_type"),
    ],
)
def test_the_first_field_in_the_way_is_named(family, changes, field):
    config = tiny_config(**{**MIXTRAL_LIKE, **changes})
    (found,) = [fit for fit in fits(config) if fit["family"] == family]
    assert (found["holds"], found["field"]) == (False, field)
    assert found["reason"] == f"{family} cannot hold this model's {field}={getattr(config, field)!r}."


def test_every_field_is_compared():
    """A field that hf_moe gets later is compared too, unless it is named as one that only training reads."""
    fields = set(HfMoeConfig.__annotations__)
    assert set(READ_IF) <= fields
    assert fields >= TRAINING_FIELDS
    everything = [
        tiny_config(n_shared_experts=1, n_group=7, topk_group=4, sliding_window=5, experts_swiglu_limit=7.0),
        tiny_config(
            layer_types=["chunked_attention"] * 3,
            attention_chunk_size=4,
            no_rope_layers=[1, 0, 1],
            attn_temperature_tuning=True,
        ),
    ]
    compared = {name for config in everything for name in computation(config)}
    assert compared == fields - {"provenance", "shared_expert_intermediate_size"}


def test_training_fields_without_a_place_are_reported(tmp_path):
    model = tiny_model(
        **{**MIXTRAL_LIKE, "router_z_loss_coef": 0.001, "seq_aux_loss_coef": 0.01, "expert_capacity_factor": 1.5}
    )
    model.save_pretrained(tmp_path / "moe")
    report = export_checkpoint(tmp_path / "moe", tmp_path / "out", to="mixtral", progress=False)
    assert report["training_fields"] == {
        "router_z_loss_coef": 0.001,
        "seq_aux_loss_coef": 0.01,
        "expert_capacity_factor": 1.5,
    }


@pytest.mark.parametrize(
    ("to", "changes"),
    [
        ("qwen2_moe", {"n_shared_experts": 3, "shared_expert_intermediate_size": 8, "shared_expert_gate": True}),
        ("deepseek", {"n_shared_experts": 1, "shared_expert_intermediate_size": 72}),
    ],
)
def test_shared_experts_count_by_their_width(to, changes, tmp_path):
    model = tiny_model(router_type="softmax_topk", attention_bias=to == "qwen2_moe", **changes)
    model.save_pretrained(tmp_path / "moe")
    export_checkpoint(tmp_path / "moe", tmp_path / "out", to=to, verify=to == "qwen2_moe", progress=False)
    back = import_checkpoint(tmp_path / "out", tmp_path / "back", verify=False, progress=False)
    ids = tokens(length=13, vocab_size=97)
    with torch.inference_mode():
        torch.testing.assert_close(load(tmp_path / "back")(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    assert back["total_params"] == model.num_parameters()


PRESETS = {
    "mixtral-8x7b": "mixtral",
    "mixtral-8x22b": "mixtral",
    "olmoe-1b-7b": "olmoe",
    "qwen1.5-moe-a2.7b": "qwen2_moe",
    "qwen3-30b-a3b": "qwen3_moe",
    "deepseek-moe-16b": "deepseek",
    "deepseek-v2": "deepseek_v2",
    "deepseek-v2-lite": "deepseek_v2",
    "deepseek-v3": "deepseek_v3",
    "dbrx": "dbrx",
    "llama-4-scout": "llama4_text",
    "llama-4-maverick": "llama4_text",
}


@pytest.mark.parametrize(("name", "family"), PRESETS.items())
def test_published_architectures_go_to_their_family(name, family):
    exported, _ = family_config(FAMILIES[family], HfMoeConfig.from_preset(name))
    assert exported.model_type == family


# What the releases' own configs say of their balance losses.
V2_LITE = {"num_hidden_layers": 27, "first_k_dense_replace": 1, "aux_loss_alpha": 0.001, "seq_aux": True}
V3 = {"num_hidden_layers": 61, "first_k_dense_replace": 3, "aux_loss_alpha": 0.0001, "seq_aux": True}
DBRX_FFN = {"moe_num_experts": 16, "moe_top_k": 4, "moe_loss_weight": 0.05}
BALANCE = {
    "mixtral-8x7b": {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.02},
    "mixtral-8x22b": {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.001},
    "olmoe-1b-7b": {"num_experts_per_tok": 8, "router_aux_loss_coef": 0.01},
    "qwen1.5-moe-a2.7b": {"num_experts_per_tok": 4, "router_aux_loss_coef": 0.001},
    "qwen3-30b-a3b": {"num_experts_per_tok": 8, "router_aux_loss_coef": 0.001},
    "llama-4-scout": {"num_experts_per_tok": 1, "router_aux_loss_coef": 0.001},
    "dbrx": {"attn_config": {"clip_qkv": 8}, "ffn_config": DBRX_FFN},
    "deepseek-v2-lite": V2_LITE,
    "deepseek-v3": {**V3, "num_mtp_layers": 0},
}


@pytest.mark.parametrize("name", BALANCE)
def test_presets_and_imports_agree_on_the_balance_loss(name):
    family = FAMILIES[PRESETS[name]]
    imported, preset = family.hf_moe_fields(family.config_class(**BALANCE[name])), HfMoeConfig.from_preset(name)
    for field in ("router_aux_loss_coef", "seq_aux_loss_coef"):
        assert getattr(preset, field) == pytest.approx(imported.get(field, 0.0)), field
    assert preset.router_aux_loss_coef or preset.seq_aux_loss_coef


def test_normalised_softmax_is_mixtral_too(tmp_path):
    model = tiny_model(**{**MIXTRAL_LIKE, "router_type": "softmax_topk", "norm_topk_prob": True})
    model.save_pretrained(tmp_path / "moe", max_shard_size="20KB")
    report = export_checkpoint(tmp_path / "moe", tmp_path / "out", to="mixtral", progress=False)
    assert report["max_abs_diff"] <= 1e-5


def test_a_model_of_our_own_as_deepseek_v3(tmp_path):
    """Trained from scratch with the bias, groups and latent attention: what vLLM and others read is in the config."""
    fields = {
        **{"attention_type": "mla", "num_key_value_heads": None, "kv_lora_rank": 8, "q_lora_rank": 12},
        **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "num_experts": 6, "n_group": 3},
        **{"topk_group": 2, "n_shared_experts": 1, "router_type": "sigmoid_topk", "norm_topk_prob": True},
        **{"router_args": {"selection_bias": True}, "router_bias_update_speed": 0.001, "router_aux_loss_coef": 0.0},
        **{"seq_aux_loss_coef": 1e-4, "routed_scaling_factor": 2.5},
    }
    model = tiny_model(**fields)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias.normal_(std=0.3)
    model.save_pretrained(tmp_path / "moe")
    report = export_checkpoint(tmp_path / "moe", tmp_path / "v3", to="deepseek_v3", progress=False)
    assert report["max_abs_diff"] <= 1e-5
    assert report["training_fields"] == {"router_bias_update_speed": 0.001}
    config = json.loads((tmp_path / "v3" / "config.json").read_text())
    said = {name: config[name] for name in ("topk_method", "scoring_func", "moe_layer_freq", "seq_aux")}
    assert said == {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1, "seq_aux": True}
    assert config["aux_loss_alpha"] == pytest.approx(0.5e-4)
    assert config["num_nextn_predict_layers"] == 0
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]


def test_mtp_layers_are_left_out_only_where_that_is_asked_for(tmp_path):
    model = tiny_model(**{**MIXTRAL_LIKE, "num_mtp_layers": 2})
    model.save_pretrained(tmp_path / "moe")
    with pytest.raises(ValueError, match=r"mixtral cannot hold this model's num_mtp_layers=2"):
        export_checkpoint(tmp_path / "moe", tmp_path / "out", to="mixtral")
    report = export_checkpoint(tmp_path / "moe", tmp_path / "out", to="mixtral", drop_mtp=True, progress=False)
    assert report["max_abs_diff"] <= 1e-5
    assert not [name for name in weights_of(tmp_path / "out") if "mtp" in name or "layers.3" in name]


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
def test_a_template_with_training_marks_is_exported_without(name, tmp_path):
    """Whose text is the same, and which Jinja itself reads."""
    tiny_model(**MIXTRAL_LIKE).save_pretrained(tmp_path / "moe")
    (tmp_path / "moe" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "moe" / name).write_text("{%- generation %}\n {{- messages }}{% endgeneration -%} .")
    export_checkpoint(tmp_path / "moe", tmp_path / "out", to="mixtral", verify=False, progress=False)
    written = (tmp_path / "out" / name).read_text()
    assert jinja2.Template(written).render(messages="Hi") == "Hi."
    assert (tmp_path / "moe" / name).read_text() != written


@pytest.mark.parametrize("folder", ["moe", "bfloat16"])
def test_what_goes_along(folder, tmp_path):
    model = tiny_model(**MIXTRAL_LIKE)
    carried = {
        "tokenizer.json": Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).to_str(),
        "tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}',
        "chat_template.jinja": "{{ messages }}",
        "generation_config.json": '{"temperature": 0.7, "eos_token_id": [2, 5]}',
        "LICENSE": "terms",
    }
    (model.to(torch.bfloat16) if folder == "bfloat16" else model).save_pretrained(tmp_path / folder)
    for name, text in {**carried, "README.md": "about hf_moe"}.items():
        (tmp_path / folder / name).write_text(text)
    report = export_checkpoint(tmp_path / folder, tmp_path / "out", to="mixtral", verify=False, progress=False)
    assert report["carried_files"] == sorted(carried)
    for name, text in carried.items():
        assert (tmp_path / "out" / name).read_text() == text
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {*carried, "README.md", "config.json", "model.safetensors"}
    assert "about hf_moe" not in (tmp_path / "out" / "README.md").read_text()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == ("bfloat16" if folder == "bfloat16" else "float32")
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert "provenance" not in config
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("b").input_ids == [1]


def test_dry_run_says_and_writes_nothing(tmp_path):
    tiny_model(**MIXTRAL_LIKE).save_pretrained(tmp_path / "moe")
    plan = export_checkpoint(tmp_path / "moe", tmp_path / "out", to="mixtral", dry_run=True)
    assert not (tmp_path / "out").exists()
    report = export_checkpoint(tmp_path / "moe", tmp_path / "out", to="mixtral", verify=False, progress=False)
    assert min(plan.pop("peak_memory_bytes"), plan.pop("verify_memory_bytes")) > 0
    assert report == plan | {"dry_run": False}
    json.dumps(report)
    assert report["disk_bytes"] == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_refuses(checkpoint, tmp_path):
    tiny_model(**MIXTRAL_LIKE).save_pretrained(tmp_path / "moe")
    damaged = Path(shutil.copytree(tmp_path / "moe", tmp_path / "damaged"))
    config = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(config | {"num_experts": 8}))
    for source, options, match in [
        (tmp_path / "moe", {"to": "llama4"}, "to='llama4'.*mixtral, olmoe"),
        (tmp_path / "moe", {"to": "switch_transformers"}, "to='switch_transformers' is an encoder-decoder"),
        (tmp_path / "moe", {"to": "mixtral", "layout": "tight"}, "layout 'tight'.*per-expert or fused"),
        (tmp_path / "moe", {"to": "deepseek", "layout": "fused"}, "layout 'fused'"),
        (checkpoint("mixtral"), {"to": "mixtral"}, "is a mixtral.*not an hf_moe"),
        (checkpoint("llama"), {"to": "mixtral"}, "is a llama"),
        (damaged, {"to": "mixtral"}, r"shape \[7, .*\[8, "),
        (tmp_path / "absent", {"to": "mixtral"}, "absent does not exist"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=match) as raised:
            export_checkpoint(source, tmp_path / "out", **options)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_trained_text_model_tells_the_same_story(shared_data, tmp_path):
    """TinyStories Llama, upcycled and exported to Mixtral: the same greedy text as before."""
    source = shared_data / "stories260K-hf"
    upcycle(source, tmp_path / "moe", experts=4, top_k=2, verify=False, progress=False)
    report = export_checkpoint(tmp_path / "moe", tmp_path / "mixtral", to="mixtral", progress=False)
    assert report["max_abs_diff"] <= 1e-4
    texts = []
    for folder in (source, tmp_path / "moe", tmp_path / "mixtral"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
        texts.append(tokenizer.decode(load(folder).generate(ids, max_new_tokens=40, do_sample=False)[0]))
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) > 60


def test_whole_numbers_as_floats(tmp_path):
    """clip_qkv=3 is a number to hf_moe; Transformers' class takes 3.0 only."""
    fields = {"mlp_layer_types": None, "qk_norm": "projection", "num_key_value_heads": 6}
    model = tiny_model(**fields, clip_qkv=3, router_aux_loss_coef=0)
    model.save_pretrained(tmp_path / "moe")
    report = export_checkpoint(tmp_path / "moe", tmp_path / "out", to="olmoe", progress=False)
    assert report["max_abs_diff"] <= 1e-5


def test_the_command_that_lists_families(tmp_path, capsys):
    tiny_model(**{**MIXTRAL_LIKE, "num_mtp_layers": 1}).save_pretrained(tmp_path / "moe")
    capsys.readouterr()
    words = ["export", str(tmp_path / "moe"), "--nearest"]
    assert main([*words, "--drop-mtp", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == nearest_families(tmp_path / "moe", drop_mtp=True)
    assert printed["nearest"][0]["family"] == "mixtral"
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(FAMILIES)
    assert "mixtral cannot hold this model's num_mtp_layers=1." in lines
    assert not [line for line in lines if "can hold" in line]
    assert main([*words, "--drop-mtp"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "mixtral can hold this model."
    assert main(words[:2]) == 2
    assert "DST is missing" in capsys.readouterr().err
    assert main([*words[:2], str(tmp_path / "out")]) == 2
    assert "--to is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path, capsys):
    tiny_model(**MIXTRAL_LIKE).save_pretrained(tmp_path / "moe")
    capsys.readouterr()
    words = ["export", str(tmp_path / "moe"), str(tmp_path / "out"), "--to"]
    assert main([*words, "mixtral", "--layout", "fused", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_abs_diff"] <= 1e-5
    assert "model.layers.0.mlp.experts.down_proj" in weights_of(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    assert main([*words, "olmoe"]) == 2
    others = "mixtral, deepseek, granitemoe and granitemoeshared"
    assert capsys.readouterr().err == f"hf-moe: olmoe cannot hold this model's qk_norm=None; {others} can.\n"
    assert main([*words, "deepseek", "--no-verify"]) == 0
