"""Experts in the decoder of a model that reads pictures: the same text about a picture, and the rest bit for bit."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hf_moe.conversion import upcycle
from hf_moe.conversion.files import writer
from hf_moe.training.weights.groups import parts_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from hf_moe.hub.checks import check_weights
from hf_moe.hub.folder import read_folder
from hf_moe.model.configuration_hf_moe_graft import HfMoeGraftConfig
from hf_moe.model.modeling_hf_moe_graft import HfMoeGraftForCausalLM, HfMoeGraftForImageTextToText
from hf_moe.routers import find_routers
from tests.picture_families import FAMILIES, PICTURES, config_of, read, tiny


def graft(model_type: str, **fields) -> HfMoeGraftForImageTextToText:
    torch.manual_seed(0)
    return HfMoeGraftForCausalLM(HfMoeGraftConfig(backbone=config_of(model_type), num_experts=3, **fields)).eval()


@pytest.mark.parametrize("model_type", PICTURES)
def test_a_copy_writes_what_the_dense_model_writes(model_type, tmp_path):
    dense = tiny(model_type)
    inputs, blank = read(model_type), read(model_type)
    blank["pixel_values"] = torch.full_like(blank["pixel_values"], 0.1)
    dense.save_pretrained(tmp_path / "dense")
    report = upcycle(tmp_path / "dense", tmp_path / "moe", experts=3, top_k=2, graft=True, progress=False)
    assert report["equal_at_step_0"] and report["max_abs_diff"] < 1e-5 and report["cached_text_equal"]
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["architectures"] == [
        "HfMoeGraftForImageTextToText"
    ]

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "moe").eval()
    assert isinstance(model, type(dense)) and isinstance(model, HfMoeGraftForImageTextToText)
    layers, kept = model.config.num_hidden_layers, dense.state_dict().keys() & model.state_dict().keys()
    assert len(find_routers(model)) == layers == len(dense.get_decoder().layers)
    assert len(dense.state_dict().keys() - kept) == 3 * layers  # gate, up and down
    assert all(torch.equal(dense.state_dict()[name], model.state_dict()[name]) for name in kept)
    with torch.no_grad():
        expected, found = dense(**inputs), model(**inputs)
        assert (dense(**blank).logits - expected.logits).abs().max() > 1e-3
        torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=1e-4)
        written = [x.generate(**inputs, max_new_tokens=5, do_sample=False) for x in (dense, model)]
    assert torch.equal(*written)

    card = (tmp_path / "moe" / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card and "pipeline_tag: image-text-to-text" in card
    check_weights(read_folder(tmp_path / "moe"))
    model.save_pretrained(tmp_path / "again")
    check_weights(read_folder(tmp_path / "again"))
    for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM):
        again = auto_class.from_pretrained(tmp_path / "again")
        assert type(again) is type(model) and again.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(x, again.state_dict()[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name not in PICTURES])
def test_a_copy_writes_what_the_dense_model_writes_of_text(model_type, tmp_path):
    dense, ids = tiny(model_type), torch.tensor([[5, 9, 17, 33, 6, 71]])
    dense.save_pretrained(tmp_path / "dense")
    report = upcycle(tmp_path / "dense", tmp_path / "moe", experts=3, top_k=2, graft=True, progress=False)
    assert report["equal_at_step_0"] and report["max_abs_diff"] < 1e-5 and report["cached_text_equal"]
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "moe").eval()
    kept = dense.state_dict().keys() & model.state_dict().keys()
    assert kept and all(torch.equal(dense.state_dict()[name], model.state_dict()[name]) for name in kept)
    assert not any("vision" in name or "visual" in name for name in dense.state_dict().keys() - kept)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, dense(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", PICTURES)
def test_trains_with_a_balance_loss_and_checkpointing(model_type):
    model = graft(model_type, router_aux_loss_coef=0.1).train()
    inputs = read(model_type)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 120, -100)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        output = model(**inputs, labels=labels)
        assert output.router_losses["router_aux_loss_coef"].item() >= 1 - 1e-5
        output.loss.backward()
        gradients.append({name: x.grad for name, x in model.named_parameters() if x.grad is not None})
        model.zero_grad()
    without, with_checkpointing = gradients
    routers = [f"{name}.weight" for name in find_routers(model)]
    assert routers and all(without[name].any() for name in routers)
    assert without.keys() == with_checkpointing.keys()
    for name, expected in without.items():
        torch.testing.assert_close(with_checkpointing[name], expected, msg=lambda text, name=name: f"{name}: {text}")


# Runs where hf_moe cannot be imported; writes the logits of each folder's model beside it.
WITHOUT_HF_MOE = """
import sys
from pathlib import Path
class Blocked:
    def find_spec(self, name, *args):
        if name.split(".")[0] == "hf_moe":
            raise ImportError(name)
sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
for folder in sys.argv[1:]:
    inputs, found = load_file(Path(folder) / "inputs"), {}
    for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM):
        model = auto_class.from_pretrained(folder, trust_remote_code=True).eval()
        with torch.no_grad():
            found[auto_class.__name__] = model(**inputs).logits
    save_file(found, Path(folder) / "found")
"""


def test_loads_where_hf_moe_is_not_installed(tmp_path):
    expected = {}
    for name in PICTURES:
        model, inputs, folder = graft(name), read(name), tmp_path / name
        model.save_pretrained(folder)
        save_file({name: x.contiguous() for name, x in inputs.items()}, folder / "inputs")
        with torch.no_grad():
            expected[folder] = model(**inputs).logits
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", WITHOUT_HF_MOE, *map(str, expected)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, logits in expected.items():
        found = load_file(folder / "found")
        assert len(found) == 2
        for name, x in found.items():
            torch.testing.assert_close(x, logits, msg=lambda text, name=f"{folder.name}, {name}": f"{name}: {text}")


@pytest.mark.parametrize("model_type", PICTURES)
def test_what_reads_pictures_is_a_part_of_its_own(model_type):
    model = graft(model_type)
    decoder = next(name for name, x in model.named_modules() if x is model.get_decoder())
    beside = {name for name, _ in model.named_parameters() if not name.startswith((f"{decoder}.", "lm_head."))}
    assert beside == {name for name, part in parts_of(model).items() if part == "encoders"}
    assert find_routers(model).keys() == {name for name in find_routers(model) if name.startswith(f"{decoder}.")}


def test_the_plan_and_the_files_that_go_along(tmp_path):
    dense = tmp_path / "dense"
    tiny("gemma3").save_pretrained(dense)
    (dense / "preprocessor_config.json").write_text("{}")
    given = {"experts": 2, "top_k": 1, "dry_run": True}
    assert "reads no pictures, which --graft keeps" in upcycle(dense, tmp_path / "moe", **given)["becomes"]
    report = upcycle(dense, tmp_path / "moe", graft=True, **given)
    assert report["becomes"] == (
        "a graft: the gemma3 stays as it is, with experts in the place of its decoder's feed-forward networks"
    )
    assert "preprocessor_config.json" in report["carried_files"] and not (tmp_path / "moe").exists()
    assert graft("gemma3").config.processor_class == "Gemma3Processor"


@pytest.mark.parametrize("said", ["eager", "sdpa", {"text_config": "eager", "vision_config": "sdpa"}], ids=str)
def test_attention_is_the_hosts(said, tmp_path):
    model, inputs = graft("gemma3"), read("gemma3")
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "moe")
    tiny("gemma3").save_pretrained(tmp_path / "dense")
    model.set_attn_implementation(said)
    loaded = [
        AutoModelForImageTextToText.from_pretrained(tmp_path / name, attn_implementation=said).eval()
        for name in ("dense", "moe")
    ]
    dense, again = loaded
    for part in ("model.language_model.layers.0.self_attn", "model.vision_tower.encoder.layers.0.self_attn", "model"):
        name = dense.get_submodule(part).config._attn_implementation
        assert [x.get_submodule(part).config._attn_implementation for x in (model, again)] == [name, name]
    assert model.config._attn_implementation == again.config._attn_implementation == dense.config._attn_implementation
    for x in (model, again):
        torch.testing.assert_close(x(**inputs).logits, expected)


@pytest.mark.parametrize("model_type", ["gemma3", "gemma4", "qwen2_5_vl"])
def test_a_static_cache(model_type):
    model, inputs = graft(model_type), read(model_type)
    expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    found = model.generate(**inputs, max_new_tokens=5, do_sample=False, cache_implementation="static")
    assert torch.equal(found, expected)


def test_refused_in_one_line():
    config = HfMoeGraftConfig(backbone={"model_type": "llama"})
    with pytest.raises(ValueError, match="A llama reads no pictures: it is an HfMoeGraftForCausalLM"):
        HfMoeGraftForImageTextToText(config)
    with pytest.raises(ValueError, match="A florence2 is no decoder that writes text"):
        HfMoeGraftForImageTextToText(HfMoeGraftConfig(backbone={"model_type": "florence2"}))


def test_an_interrupted_conversion_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    tiny("qwen3_5").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    given = {"experts": 3, "top_k": 2, "graft": True, "progress": False, "verify": False, "max_shard_size": "20KB"}
    upcycle(tmp_path / "dense", tmp_path / "whole", **given)
    written, write = [], writer.write_shard

    def full(folder, shard, advance):
        if len(written) == 4:
            raise OSError("No space left on device")
        written.append(shard.file)
        write(folder, shard, advance)

    monkeypatch.setattr(writer, "write_shard", full)
    with pytest.raises(OSError, match="No space left"):
        upcycle(tmp_path / "dense", tmp_path / "moe", **given)
    monkeypatch.undo()
    upcycle(tmp_path / "dense", tmp_path / "moe", **given, resume=True)
    shards = sorted(path.name for path in (tmp_path / "whole").glob("*.safetensors"))
    assert len(shards) > 5
    for name in shards:
        assert (tmp_path / "moe" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
