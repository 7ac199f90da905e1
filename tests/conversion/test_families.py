"""The tables account for every field, and an imported model is the released one: same weights, same logits."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hf_moe.conversion import import_checkpoint
from hf_moe.conversion.families import DENSE_FAMILIES, FAMILIES, IMPORTED
from hf_moe.conversion.families.family import COMMON_NEUTRAL, COMMON_REQUIRED
from transformers import AutoModelForCausalLM

from hf_moe import HfMoeConfig
from tests.conftest import tokens
from tests.conversion.conftest import MOE_CASES, SIZES, check_import_refused, dbrx, files_of

ALL = DENSE_FAMILIES | IMPORTED
# By default two say that there is a layer for it, and one that there is no shared expert.
NEEDED = {name: {"num_mtp_layers": 0} for name in ("deepseek_v3", "kimi_k2")} | {"dots1": {"n_shared_experts": 1}}


@pytest.mark.parametrize("name", ALL)
def test_every_field_of_the_family_is_accounted_for(name):
    """Fails when Transformers gives the family a new field: decide what hf_moe does with it, then add it."""
    declared = {field.name for field in dataclasses.fields(ALL[name].config_class)}
    family = ALL[name]
    assert family.model_type == name
    assert not declared - family.accounted_fields() - COMMON_NEUTRAL - COMMON_REQUIRED.keys()
    assert not family.accounted_fields() - declared, "the table names fields that the class does not have"
    assert not family.undeclared & declared, "these are declared by now"


@pytest.mark.parametrize("name", ALL)
def test_tables_name_fields_of_hf_moe(name):
    known = {field.name for field in dataclasses.fields(HfMoeConfig)}
    assert set(ALL[name].fields) <= known
    assert set(ALL[name].constants) <= known
    assert not set(ALL[name].fields) & set(ALL[name].constants)
    assert not ALL[name].accounted_fields() & COMMON_NEUTRAL


@pytest.mark.parametrize("name", [name for name in ALL if name != "dbrx"])  # whose fields lie deeper
def test_a_field_that_a_table_does_not_know_is_refused_by_name(name, monkeypatch):
    config = ALL[name].config_class(**SIZES, **NEEDED.get(name, {}))
    fields = ALL[name].hf_moe_fields(config)
    assert fields["hidden_size"] == 24
    family = dataclasses.replace(
        ALL[name], fields={key: value for key, value in ALL[name].fields.items() if key != "hidden_act"}
    )
    family.hf_moe_fields(config)
    field = ALL[name].fields["hidden_act"]
    setattr(config, field, "relu")
    with pytest.raises(ValueError, match=f"{name} field {field}='relu' cannot be carried"):
        family.hf_moe_fields(config)


@pytest.mark.parametrize(
    ("part", "changes", "match"),
    [
        ("attn_config", {"pos_bias": 3}, r"attn_config\.pos_bias=3"),
        ("attn_config", {"clip_qkv": None}, r"attn_config\.clip_qkv=None"),
        ("ffn_config", {"moe_normalize_expert_weights": 2.0}, r"moe_normalize_expert_weights=2\.0"),
        ("ffn_config", {"ffn_act_fn": {"name": "gelu", "approximate": "tanh"}}, "ffn_act_fn={'name': 'gelu'"),
        ("ffn_config", {"uniform_expert_assignment": True}, r"ffn_config\.uniform_expert_assignment=True"),
    ],
)
def test_fields_of_dbrx_that_are_not_known_are_refused_by_name(part, changes, match):
    fields = dbrx(clip_qkv=3.0)
    FAMILIES["dbrx"].hf_moe_fields(FAMILIES["dbrx"].config_class(**fields))
    fields[part] |= changes
    with pytest.raises(ValueError, match=f"dbrx field .*{match}.* cannot be carried"):
        FAMILIES["dbrx"].hf_moe_fields(FAMILIES["dbrx"].config_class(**fields))


def test_the_rope_of_dbrx_is_that_of_its_release():
    """The release says theta within attn_config; Transformers 5 reads 10000 then, which is not what was trained."""
    read = FAMILIES["dbrx"].hf_moe_fields
    fields = dbrx(clip_qkv=3.0, rope_theta=500000)
    del fields["rope_parameters"]
    assert read(FAMILIES["dbrx"].config_class(**fields))["rope_parameters"]["rope_theta"] == 500000.0
    fields["rope_parameters"] = {"rope_type": "default", "rope_theta": 77.0}
    with pytest.raises(ValueError, match=r"attn_config\.rope_theta=500000.*77\.0"):
        read(FAMILIES["dbrx"].config_class(**fields))


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


LAYOUTS = {
    "per-expert": {},
    "per-expert-sharded": {"sharded": True},
    "fused": {"save_original_format": False},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", MOE_CASES)
def test_import_is_the_released_model(case, layout, checkpoint, tmp_path):
    source = checkpoint(case, **LAYOUTS[layout])
    report = import_checkpoint(source, tmp_path / "moe", max_shard_size="9KB", verify=False, progress=False)
    theirs, ours = load(source), load(tmp_path / "moe")
    expected = {name.replace(".shared_expert.", ".shared_experts."): x for name, x in theirs.state_dict().items()}
    weights = ours.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name
    ids = tokens(length=23, vocab_size=61)
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-5)
    greedy = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **greedy), theirs.generate(ids, **greedy))
    assert report["total_params"] == ours.num_parameters() == theirs.num_parameters()
    assert ours.config.router_aux_loss_coef == theirs.config.num_experts_per_tok * 0.03
    assert ours.config.provenance["method"] == "import"


def test_layouts_give_the_same_bytes(checkpoint, tmp_path):
    written = []
    for layout, options in LAYOUTS.items():
        import_checkpoint(checkpoint("qwen2_moe", **options), tmp_path / layout, verify=False, progress=False)
        written.append(files_of(tmp_path / layout)["model.safetensors"])
    assert written[0] == written[1] == written[2]


def test_import_reports_the_comparison(checkpoint, tmp_path):
    plan = import_checkpoint(checkpoint("olmoe"), tmp_path / "moe", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    report = import_checkpoint(checkpoint("olmoe"), tmp_path / "moe", progress=False)
    assert report["max_abs_diff"] <= 1e-5
    assert report["top1_agreement"] == 1
    assert (report["total_params"], report["disk_bytes"]) == (plan["total_params"], plan["disk_bytes"])


def test_an_encoder_decoder_is_refused(tmp_path):
    (tmp_path / "switch").mkdir()
    (tmp_path / "switch" / "config.json").write_text(json.dumps({"model_type": "switch_transformers"}))
    with pytest.raises(ValueError, match="switch_transformers, an encoder-decoder: hf_moe's models are decoders"):
        import_checkpoint(tmp_path / "switch", tmp_path / "moe")


REFUSED = {
    "dense": ("llama", {}, "llama, a dense model: upcycle it"),
    "jitter": ("mixtral", {"router_jitter_noise": 0.1}, "mixtral field router_jitter_noise=0.1.*only 0.0"),
    "head_dim": ("olmoe", {"head_dim": 8}, "olmoe field head_dim=8"),
    "fewer experts": ("olmoe", {"num_experts": 4}, r"holds model\.layers\.0\.mlp\.experts\.4"),
    "more experts": ("olmoe", {"num_experts": 6}, r"lacks model\.layers\.0\.mlp\.experts\.5"),
    "top_k": ("olmoe", {"num_experts_per_tok": 6}, r"olmoe.*num_experts_per_tok \(6\).*\(5\)"),
    "window": ("qwen2_moe", {"layer_types": ["sliding_attention"] * 3}, "sliding_window"),
}


@pytest.mark.parametrize(("case", "changes", "match"), REFUSED.values(), ids=REFUSED)
def test_import_refuses(case, changes, match, checkpoint, tmp_path):
    check_import_refused(checkpoint(case), changes, match, tmp_path / case)
