"""What is listed as no decoder that experts can be grafted onto is refused, in one line; and bad checkpoints are."""

import json

import pytest
from hf_moe.conversion import upcycle
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from hf_moe.model.configuration_hf_moe_graft import HfMoeGraftConfig
from hf_moe.model.modeling_hf_moe_graft import HfMoeGraftForCausalLM
from tests import picture_families
from tests.dense_families import LEFT_OUT, config_of, tiny

# Those of LEFT_OUT that are not refused: their texts are of another kind, or have no tiny model.
UNTESTED = ("doge", "moshi", "reformer", "xlm", "xlstm", "xmod", "zamba", "git")


def assert_refused(folder, said: str, **options) -> None:
    given = {"experts": 2, "top_k": 1, "graft": True, "progress": False}
    with pytest.raises((ValueError, FileNotFoundError), match=said) as raised:
        upcycle(folder, folder.with_name("moe"), **given | options)
    assert "\n" not in str(raised.value) and not folder.with_name("moe").exists()


@pytest.mark.parametrize("model_type", [name for name in LEFT_OUT if name not in UNTESTED and name in CONFIG_MAPPING])
def test_left_out(model_type):
    config = HfMoeGraftConfig(backbone=config_of(model_type))
    with pytest.raises(
        ValueError, match=r"dense feed-forward network|cannot be tried|computes something else"
    ) as raised:
        HfMoeGraftForCausalLM(config)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "model_type",
    ["blip", "blip-2", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5", "git", "pi0", "evolla"],
)
def test_left_out_of_those_that_read_pictures(model_type, tmp_path):
    assert model_type in picture_families.LEFT_OUT or model_type in LEFT_OUT
    CONFIG_MAPPING[model_type]().save_pretrained(tmp_path / "dense")
    assert_refused(tmp_path / "dense", "no decoder that writes text|has a dense feed-forward|reads no text without")


@pytest.fixture
def dense(tmp_path):
    tiny("cohere").save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def edit_config(folder, **changes) -> None:
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | changes))


def edit_weights(folder, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def test_a_tensor_that_is_missing(dense):
    edit_weights(dense, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert_refused(dense, "lacks model.layers.1.mlp.up_proj.weight, which a cohere with its config calls for")


def test_a_tensor_that_is_left_over(dense):
    edit_weights(dense, lambda weights: weights.update(more=weights["model.norm.weight"].clone()))
    assert_refused(dense, "holds more, which a cohere with this config does not use")


def test_a_tensor_of_another_shape(dense):
    edit_config(dense, intermediate_size=28)
    assert_refused(dense, r"has shape \[\d+, \d+\], but the config calls for \[\d+, \d+\]")


@pytest.mark.parametrize(
    ("changes", "said"),
    {
        "unknown": ({"model_type": "gpt7"}, "'gpt7', which Transformers .* does not know: take a newer one"),
        "quantized": ({"quantization_config": {"quant_method": "awq"}}, "is quantized: experts are grafted onto"),
        "encoder-decoder": ({"model_type": "t5"}, "a t5, no decoder that writes text"),
        "sound": (
            {"model_type": "qwen2_audio"},
            r"a qwen2_audio, no decoder .* pictures: .* Its language model \(qwen2\) may be taken alone: save it",
        ),
        "pictures by an encoder-decoder": ({"model_type": "florence2"}, "a florence2, no decoder .* onto those.$"),
        "no text alone": (
            {"model_type": "blip-2"},
            r"a blip-2, which reads no text without pixel_values: .* Its language model \(opt\) may be taken alone",
        ),
        "a mixture": ({"model_type": "mixtral"}, "a mixtral, already a mixture of experts: train it as it is"),
        "hf_moe": ({"model_type": "hf_moe_graft"}, "an hf_moe checkpoint already"),
    }.values(),
)
def test_configs(changes, said, dense):
    edit_config(dense, **changes)
    assert_refused(dense, said)


def test_layers_without_a_network(dense):
    assert_refused(dense, "layers '9': 9 is not within 0-3", layers="9")


def test_a_dry_run_writes_nothing(dense):
    report = upcycle(dense, dense.with_name("moe"), experts=2, top_k=1, dry_run=True)
    assert report["becomes"].startswith("a graft: the cohere stays as it is") and report["total_params"] > 0
    assert not dense.with_name("moe").exists()


def test_the_plan_names_the_architecture(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "dense")
    given = {"experts": 2, "top_k": 1, "dry_run": True}
    assert "has a table for llama" in upcycle(tmp_path / "dense", tmp_path / "moe", **given)["becomes"]
    assert "the llama stays" in upcycle(tmp_path / "dense", tmp_path / "moe", graft=True, **given)["becomes"]
