"""Ids of special tokens that a model has no row for: carried without, in one line, and never a padding row."""

import json
import shutil

import pytest
import torch
from hf_moe.conversion import export_checkpoint, import_checkpoint, upcycle
from hf_moe.conversion.output import write_shards
from transformers import AutoModelForCausalLM

from hf_moe.loading import load_model

from ..conftest import tiny_model
from .conftest import SIZES

ROWS = SIZES["vocab_size"]
OUTSIDE = [ROWS, ROWS + 7, -1]


def changed(source, folder, generation=None, **config):
    shutil.copytree(source, folder)
    for name, said in (("config.json", config), ("generation_config.json", generation)):
        if said:
            known = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(known | said))
    return folder


def said(folder, name="config.json"):
    return json.loads((folder / name).read_text())


CONVERSIONS = {
    "upcycle": ("llama", lambda *x: upcycle(*x, experts=2, top_k=1, progress=False)),
    "graft": ("llama", lambda *x: upcycle(*x, experts=2, top_k=1, graft=True, progress=False)),
    "import": ("mixtral", lambda *x: import_checkpoint(*x, progress=False)),
}


@pytest.mark.parametrize("name", CONVERSIONS)
@pytest.mark.parametrize("pad", OUTSIDE)
def test_a_conversion_says_and_leaves_out_a_padding_that_is_no_row(name, pad, checkpoint, tmp_path, capsys):
    case, convert = CONVERSIONS[name]
    ids = {"pad_token_id": pad, "eos_token_id": [5, ROWS]}
    source = changed(checkpoint(case), tmp_path / "source", {**ids, "temperature": 0.7}, **ids)
    report = convert(source, tmp_path / "moe")
    line = f"pad_token_id {pad} and eos_token_id [5, {ROWS}] left out: the model's rows are 0 to {ROWS - 1}"
    assert f"source: {line}, and none of them is for padding" in capsys.readouterr().err
    assert report["max_abs_diff"] < 1e-4
    for file in ("config.json", "generation_config.json"):
        written = said(tmp_path / "moe", file)
        written = written.get("backbone", written)
        assert written.get("pad_token_id") is None and written["eos_token_id"] == [5]
    assert said(tmp_path / "moe", "generation_config.json")["temperature"] == 0.7
    model = load_model(tmp_path / "moe")
    assert model.get_input_embeddings().padding_idx is None
    if name == "import":  # an hf_moe folder that says such an id is exported without it
        changed(tmp_path / "moe", tmp_path / "old", **ids)
        export_checkpoint(tmp_path / "old", tmp_path / "mixtral", to="mixtral", progress=False)
        AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral")


@pytest.mark.parametrize("pad", OUTSIDE)
def test_hosts_models_load_without_such_a_row(pad, checkpoint, tmp_path, capsys):
    model = load_model(changed(checkpoint("olmoe"), tmp_path / "olmoe", pad_token_id=pad))
    assert (
        model.get_input_embeddings().padding_idx is None and "none of them is for padding" in capsys.readouterr().err
    )


@pytest.mark.parametrize("pad", [97, -1, None, 0, 96])
def test_only_a_row_pads(pad):
    model = tiny_model(pad_token_id=pad)
    assert model.model.embed_tokens.padding_idx == (pad if pad in (0, 96) else None)
    model(torch.tensor([[96, 3]])).logits.sum().backward()
    assert bool(model.model.embed_tokens.weight.grad[96].any()) == (pad != 96)


@pytest.mark.parametrize("generation", [{"num_return_sequences": 3}, {"max_new_tokens": 0}, "no object"], ids=str)
def test_a_generation_config_that_loads_nowhere_is_refused_before_anything_is_written(
    generation, checkpoint, tmp_path
):
    source = changed(checkpoint("llama"), tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps(generation))
    with pytest.raises(ValueError, match=r"source/generation_config.json cannot be used, so correct or remove it"):
        upcycle(source, tmp_path / "moe", experts=2, top_k=1, progress=False)
    assert sorted(tmp_path.iterdir()) == [source]


def test_what_goes_along_is_written_before_the_weights(checkpoint, tmp_path, monkeypatch):
    seen = []

    def look(folder, *args):
        seen.extend(path.name for path in folder.iterdir())
        write_shards(folder, *args)

    monkeypatch.setattr("hf_moe.conversion.output.write_shards", look)
    upcycle(checkpoint("llama"), tmp_path / "moe", experts=2, top_k=1, progress=False, verify=False)
    assert {"config.json", "generation_config.json", "modeling_hf_moe.py"} <= set(seen)
