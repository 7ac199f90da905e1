"""Families whose tensors or fields differ further from ours: the same logits, and back again bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hf_moe.conversion import export_checkpoint, import_checkpoint
from hf_moe.conversion.computation import computation
from hf_moe.conversion.export_checkpoint import open_hf_moe, rearranged
from hf_moe.conversion.families import FAMILIES
from hf_moe.conversion.files.source import open_source
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from hf_moe import HfMoeConfig
from tests.conftest import tokens
from tests.conversion.conftest import OTHER_CASES, build, check_import_refused, count, dbrx

SAVED = {"as released": {}, "as in memory": {"save_original_format": False}}
GREEDY = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: x for file in sorted(folder.glob("*.safetensors")) for name, x in load_file(file).items()}


# The two are one and the same where a family has one layout.
FILES = [
    (case, saved)
    for case, (family, _) in OTHER_CASES.items()
    for saved in list(SAVED)[: len(FAMILIES[family].layouts)]
]


@pytest.mark.parametrize(("case", "saved"), FILES, ids=[" ".join(file) for file in FILES])
def test_there_and_back(case, saved, checkpoint, tmp_path):
    """Logits and greedy text of Transformers' class; the same tensors, and a config that is read as before."""
    family = OTHER_CASES[case][0]
    source = checkpoint(case, **SAVED[saved])
    report = import_checkpoint(source, tmp_path / "moe", max_shard_size="9KB", verify=False, progress=False)
    theirs, ours = load(source), load(tmp_path / "moe")
    ids = tokens(length=23, vocab_size=61)
    with torch.inference_mode():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=1e-5)
    assert torch.equal(ours.generate(ids, **GREEDY), theirs.generate(ids, **GREEDY))
    assert report["total_params"] == ours.num_parameters() == count(theirs)

    layouts = list(FAMILIES[family].layouts)
    layout = layouts[0 if saved == "as released" else -1]
    export = export_checkpoint(
        tmp_path / "moe", tmp_path / "back", to=family, layout=layout, max_shard_size="9KB", progress=False
    )
    assert export["max_abs_diff"] <= 1e-5
    assert export["training_fields"] == {}
    written, read = weights_of(tmp_path / "back"), weights_of(source)
    assert written.keys() == read.keys()
    for name, weight in written.items():
        assert torch.equal(weight, read[name]), name
    first, second = (
        computation(HfMoeConfig(**FAMILIES[family].hf_moe_fields(AutoConfig.from_pretrained(folder))))
        for folder in (source, tmp_path / "back")
    )
    assert first == second
    with torch.inference_mode():  # the same weights, which may lie otherwise in memory: other kernels
        torch.testing.assert_close(load(tmp_path / "back")(ids).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["glm4_moe", "glm4_moe_lite", "hy_v3"])
def test_the_mtp_layer_is_carried(case, tmp_path):
    """Stored as if it followed the last layer; in GLM with its own copies of the embedding and the head."""
    family, changes = OTHER_CASES[case]
    mtp = FAMILIES[family].mtp
    build(family, **changes).save_pretrained(tmp_path / "glm")
    weights = load_file(tmp_path / "glm" / "model.safetensors")
    added = {"enorm.": (24,), "hnorm.": (24,), "eh_proj.": (24, 48), mtp.tensors["norm."]: (24,)}
    weights |= {f"model.layers.2.{name}weight": torch.randn(shape) for name, shape in added.items()}
    weights |= {f"model.layers.2.{copy}": weights[name].clone() for copy, name in mtp.copies.items()}
    save_file(weights, tmp_path / "glm" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "glm" / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"], "num_nextn_predict_layers": 1}
    (tmp_path / "glm" / "config.json").write_text(json.dumps(config))

    import_checkpoint(tmp_path / "glm", tmp_path / "moe", verify=False, progress=False)
    model = load(tmp_path / "moe")
    assert model.config.num_mtp_layers == len(model.model.mtp_layers) == 1
    export_checkpoint(tmp_path / "moe", tmp_path / "back", to=family, verify=False, progress=False)
    written = weights_of(tmp_path / "back")
    assert written.keys() == weights.keys()
    for name, weight in written.items():
        assert torch.equal(weight, weights[name]), name
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_nextn_predict_layers"] == 1


def test_the_language_model_of_a_llama_4_that_sees_pictures(checkpoint, tmp_path):
    """As released: the tensors of the text model behind `language_model.`, beside those of the vision tower."""
    text = checkpoint("llama4_text")
    weights = {f"language_model.{name}": x for name, x in load_file(text / "model.safetensors").items()}
    weights |= {
        "vision_model.class_embedding": torch.ones(8),
        "multi_modal_projector.linear_1.weight": torch.ones(8, 8),
    }
    (tmp_path / "llama4").mkdir()
    save_file(weights, tmp_path / "llama4" / "model.safetensors", metadata={"format": "pt"})
    vision = {"model_type": "llama4_vision_model", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = {"text_config": json.loads((text / "config.json").read_text()), "vision_config": vision}
    config |= {"model_type": "llama4", "architectures": ["Llama4ForConditionalGeneration"]}
    (tmp_path / "llama4" / "config.json").write_text(json.dumps(config))
    import_checkpoint(tmp_path / "llama4", tmp_path / "moe", verify=False, progress=False)
    import_checkpoint(text, tmp_path / "text", verify=False, progress=False)
    assert (tmp_path / "moe" / "model.safetensors").read_bytes() == (
        tmp_path / "text" / "model.safetensors"
    ).read_bytes()
    ids = tokens(length=23, vocab_size=61)
    with torch.inference_mode():
        ours, theirs = (load(tmp_path / name)(ids).logits for name in ("moe", "text"))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_glm_says_how_much_it_rotates_as_in_the_release(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint("glm4_moe"), tmp_path / "glm"))
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config | {"partial_rotary_factor": 0.5, "rope_theta": 100.0}))
    report = import_checkpoint(folder, tmp_path / "moe", dry_run=True, progress=False)
    assert report["ignored_config_keys"] == []


def test_a_minimax_says_how_much_it_rotates_as_in_the_release(checkpoint, tmp_path):
    """`rotary_dim` of the release is read, and written for programs that read it."""
    folder = Path(shutil.copytree(checkpoint("minimax_m2"), tmp_path / "minimax"))
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rotary_dim": 6, "rope_theta": 100.0, "scoring_func": "sigmoid", "attn_type_list": [1, 1, 1]}
    (folder / "config.json").write_text(json.dumps(config))
    report = import_checkpoint(folder, tmp_path / "moe", progress=False)
    assert report["max_abs_diff"] <= 1e-5
    assert report["ignored_config_keys"] == []
    export_checkpoint(tmp_path / "moe", tmp_path / "back", to="minimax_m2", verify=False, progress=False)
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: written[name] for name in ("rotary_dim", "scoring_func", "use_routing_bias", "attn_type_list")} == {
        "rotary_dim": 6,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "attn_type_list": [1, 1, 1],
    }
    ids = tokens(length=23, vocab_size=61)
    with torch.inference_mode():
        expected = load(checkpoint("minimax_m2"))(ids).logits
        torch.testing.assert_close(load(tmp_path / "back")(ids).logits, expected, rtol=0, atol=1e-5)


def test_a_dbrx_as_released_is_not_compared(checkpoint, tmp_path):
    """Transformers 5 does not find the release's theta, so its logits are not the release's; hf_moe's are."""
    folder = Path(shutil.copytree(checkpoint("dbrx"), tmp_path / "dbrx"))
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"rope_theta=10000\.0.*trained with 77\.0.*verify=False"):
        import_checkpoint(folder, tmp_path / "moe", progress=False)
    import_checkpoint(folder, tmp_path / "moe", verify=False, progress=False)
    ids = tokens(length=23, vocab_size=61)
    with torch.inference_mode():
        expected = load(checkpoint("dbrx"))(ids).logits
        torch.testing.assert_close(load(tmp_path / "moe")(ids).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["dbrx", "llama4_text", "gpt_oss"])
def test_one_expert_at_a_time(family, tmp_path):
    """What is transposed or interleaved is in memory one expert at a time, in both directions."""
    sizes = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    experts = {"num_local_experts": 40, "num_experts_per_tok": 1, "intermediate_size": 128}
    if family == "dbrx":
        experts = {**dbrx(clip_qkv=1.0), "d_model": 64}
        experts["ffn_config"] |= {"moe_num_experts": 40, "ffn_hidden_size": 128}
    build(family, **{**sizes, "intermediate_size_mlp": 64, **experts}).save_pretrained(tmp_path / family)
    import_checkpoint(tmp_path / family, tmp_path / "moe", verify=False, progress=False)
    with torch.profiler.profile(profile_memory=True) as profile:
        source = open_source(tmp_path / family, FAMILIES)
        there = source.outputs(source.hf_moe_config())
        back, config = open_hf_moe(tmp_path / "moe", drop_mtp=False)
        outputs = back.outputs(config)
        shapes = {output.name: output.shape for output in outputs.values()}
        moved = rearranged(outputs, FAMILIES[family].regions(shapes, "fused", config))
        for output in [*there.values(), *moved]:
            for piece in output.pieces():
                piece.contiguous()
    one_expert = 2 * 128 * 64 * 4
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert one_expert // 2 <= largest <= one_expert


REFUSED = {
    "jitter on the whole block": ("minimax_m2", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    "lightning attention": ("minimax_m2", {"attn_type_list": [1, 0, 1]}, r"attn_type_list=\[1, 0, 1\]"),
    "softmax scores": ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
    "no bias": ("minimax_m2", {"use_routing_bias": False}, "use_routing_bias=False"),
    "norm of each head": ("minimax_m2", {"qk_norm_type": "per_head"}, "qk_norm_type='per_head'"),
    "a shared expert": ("minimax_m2", {"shared_intermediate_size": 8}, "shared_intermediate_size=8"),
    "no shared experts": ("glm4_moe", {"n_shared_experts": 0}, "n_shared_experts=0"),
    "part of RoPE": (
        "granitemoe",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor=0.5",
    ),
    "another width": ("granitemoeshared", {"shared_intermediate_size": 20}, r"input_linear.* \[56, 24\].* \[40, 24\]"),
    "dropout": ("dbrx", {"resid_pdrop": 0.1}, "resid_pdrop=0.1"),
    "another matrix": ("dbrx", {"attn_config": dbrx(kv_n_heads=4, clip_qkv=1.0)["attn_config"]}, r"Wqkv.* \[72, 24\]"),
    "fewer experts": ("llama4_text", {"num_local_experts": 4}, r"router.* \[5, 24\].* \[4, 24\]"),
    "a window": ("llama4_text", {"layer_types": ["sliding_attention"] * 4}, "sliding_window is None"),
    "another activation": ("gpt_oss", {"hidden_act": "gelu"}, "hidden_act 'silu'"),
    "wider experts": ("gpt_oss", {"intermediate_size": 32}, r"gate_up_proj has shape \[5, 24, 72\].* \[5, 24, 64\]"),
}


@pytest.mark.parametrize(("case", "changes", "match"), REFUSED.values(), ids=REFUSED)
def test_refuses(case, changes, match, checkpoint, tmp_path):
    check_import_refused(checkpoint(case), changes, match, tmp_path / case)
