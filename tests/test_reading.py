"""What people's files say wrongly is one line from whatever reads them, and leaves nothing behind."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_moe.demo import DEMO_MODEL
from hf_moe.reading import is_finite, whole_model

from .cli.conftest import command, upcycled  # noqa: F401  (fixtures)
from .conversion.conftest import build

ROWS = {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello."}]}


@pytest.fixture
def changed(tmp_path, upcycled):  # noqa: F811
    """changed(file, **fields) -> a folder of the upcycled model in which that file says something else."""

    def make(file: str, **fields):
        folder = tmp_path / "model"
        shutil.copytree(upcycled, folder)
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | fields))
        return folder

    return make


@pytest.fixture
def refused(command, tmp_path):  # noqa: F811
    """refused(words...): the command ends in exit code 2 and one line, which it returns, and no file is written."""

    def run(*words) -> str:
        before = sorted(tmp_path.rglob("*"))
        result = command(*words)
        assert result.code == 2
        (line,) = [x for x in result.err.splitlines() if x.startswith("hf-moe: ")]
        assert result.err.rstrip().endswith(line)
        assert "Traceback" not in result.err
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return run


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(json.dumps(ROWS) + "\n")
    return path


def train(model, rows, out, *further) -> list:
    places = ["--model_name_or_path", model, "--train_data", rows, "--output_dir", out]
    return ["train", "tiny/sft", *places, "--max_steps", "1", *further]


CONFIGS = {
    "a type": ({"num_hidden_layers": [None]}, "num_hidden_layers"),
    "a division by zero": ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads"),
    "a width": ({"hidden_size": 10**6}, "is no number|parameters, but the weights"),  # beyond any memory
}


@pytest.mark.parametrize(("fields", "match"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_is_refused_by_every_command(fields, match, changed, refused, rows, tmp_path):
    model = changed("config.json", **fields)
    for words in (("trace", model, "--data", rows, "--out", tmp_path / "out"), train(model, rows, tmp_path / "out")):
        line = refused(*words)
        assert re.search(match, line) and str(model) in line


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"text_config": float("nan")}, "text_config=nan, which is no config"),
        ({"decoder": {"hidden_size": 8}}, "decoder={.*}, which is no config"),
        ({"text_config": {}, "decoder": {}}, "Multiple valid text configs"),
    ],
    ids=["a number", "an object", "two"],
)
def test_a_part_for_text_that_is_none(fields, match, refused, rows, tmp_path):
    model = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    config = json.loads((DEMO_MODEL / "config.json").read_text()) | fields
    (model / "config.json").write_text(json.dumps(config))
    for words in (
        ("trace", model, "--data", rows, "--out", tmp_path / "out"),
        ("verify", DEMO_MODEL, model),
        ("card", model),
        train(model, rows, tmp_path / "out"),
    ):
        line = refused(*words)
        assert re.search(match, line) and str(model) in line


def test_more_layers_than_there_are_weights(tmp_path):
    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    config = json.loads((DEMO_MODEL / "config.json").read_text()) | {"num_hidden_layers": 10**9}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="num_hidden_layers=1000000000, but"):
        whole_model(tmp_path / "model")


def test_weights_that_are_no_numbers(refused, rows, tmp_path):
    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    weights = load_file(DEMO_MODEL / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    assert "the first of them model.norm.weight" in refused(*train(tmp_path / "model", rows, tmp_path / "out"))


def test_weights_that_cannot_become_the_models(refused, rows, tmp_path):
    build("mixtral", num_local_experts=2, num_experts_per_tok=1, vocab_size=512).save_pretrained(tmp_path / "model")
    for file in DEMO_MODEL.glob("*token*"):
        shutil.copy(file, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = next(name for name in weights if name.endswith("experts.1.w1.weight"))
    weights[name] = weights[name].T.contiguous()
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    line = refused(*train(tmp_path / "model", rows, tmp_path / "out"))
    assert "its weights do not make model.layers.0.mlp.experts.gate_up_proj: stack expects" in line


# A model of the tokenizers library that knows letters, and not the token that it has for all else.
UNKNOWN = {"type": "BPE", "vocab": {x: i for i, x in enumerate("dorw")}, "merges": [], "unk_token": "<unk>"}
TOKENIZERS = {
    "the library's own exception": ("tokenizer.json", {"decoder": {"type": "nothing"}}, "untagged enum"),
    "a TypeError": ("tokenizer_config.json", {"bos_token": 3}, "bos_token"),
    "what shows on some texts alone": ("tokenizer.json", {"model": UNKNOWN}, "`<unk>` not found in the vocabulary"),
    "what shows in use alone": ("tokenizer_config.json", {"model_max_length": "long"}, "not supported between"),
}


@pytest.mark.parametrize(("file", "fields", "match"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_is_refused_by_every_command(file, fields, match, changed, refused, rows, tmp_path):
    model = changed(file, **fields)
    for words in (
        ("trace", model, "--data", rows, "--out", tmp_path / "out"),
        ("verify", DEMO_MODEL, model),
        train(model, rows, tmp_path / "out"),
    ):
        line = refused(*words)
        assert match in line and str(model) in line


def test_a_run_that_is_refused_leaves_no_folder(refused, rows, tmp_path):
    rows = {"prompt": "Hello."}
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows) + "\n")
    words = train(DEMO_MODEL, tmp_path / "rows.jsonl", tmp_path / "out", "--num_generations", "2")
    assert "router_replay" in refused(*[*words[:1], "tiny/grpo", *words[2:]])


def test_half_a_surrogate_pair_in_a_row(refused, upcycled, tmp_path):  # noqa: F811
    talk = [{"role": "user", "content": "a \ud800", "x": 1}, {"role": "assistant", "content": ["b"]}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": talk}) + "\n")
    assert "cannot be read as rows" in refused(*train(upcycled, tmp_path / "rows.jsonl", tmp_path / "out"))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "a \ud800"}) + "\n")
    line = refused("trace", upcycled, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out")
    assert line.endswith("row 1 has half of a surrogate pair, \\ud800, at character 2.")


def test_a_recipe_too_deep_to_read(refused, tmp_path):
    (tmp_path / "recipe.yaml").write_text("[" * 100_000)
    assert "is not YAML" in refused("train", "--check", tmp_path / "recipe.yaml")


def test_a_prompt_beyond_the_models_positions(refused, upcycled, tmp_path):  # noqa: F811
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Once upon a time " * 5000}) + "\n")
    words = train(upcycled, tmp_path / "rows.jsonl", tmp_path / "out", "--num_generations", "2")
    line = refused(*[*words[:1], "tiny/grpo", *words[2:]])
    assert "but the model has 512 positions for it and the answer" in line


def test_numbers_are_looked_for_in_the_part_that_a_process_has():
    """Six rows over four processes leave the last without any."""
    assert is_finite(SimpleNamespace(to_local=lambda: torch.empty(0, 12)))
    assert not is_finite(SimpleNamespace(to_local=lambda: torch.tensor([0.0, float("nan")])))
