"""In which type a run saves: the source's or the one asked for; checkpoints are as exact as what trains."""

import json

import pytest
import torch
from hf_moe.training.main import main
from hf_moe.training.output.saved_dtype import cast
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from .models import hf_moe_biased
from .policies import BYTES, save_model

BIAS = "e_score_correction_bias"
SHORT = ["--max_steps", "2", "--save_steps", "1", "--save_total_limit", "9", "--disable_tqdm", "true"]
SHORT += ["--learning_rate", "1e-2", "--warmup_steps", "0", "--router_bias_update_speed", "1e-3"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """In bfloat16, the head tied to the embeddings."""
    model = hf_moe_biased(**BYTES, tie_word_embeddings=True).to(torch.bfloat16)
    return save_model(tmp_path_factory.mktemp("dtype") / "model", model)


@pytest.fixture
def run(source, data_folder, tmp_path, capsys):
    def run(*words, name="out", model=source):
        given = {"model_name_or_path": model, "train_data": data_folder / "train.jsonl", "output_dir": tmp_path / name}
        main(["tiny/sft", *(f"--{key}={value}" for key, value in given.items()), *SHORT, *map(str, words)])
        return tmp_path / name, capsys.readouterr().err

    return run


def types(folder) -> tuple[set, set, str]:
    """Of the weights, of the selection biases, and what config.json says."""
    weights = load_file(folder / "model.safetensors")
    biases = {name for name in weights if name.endswith(BIAS)}
    said = json.loads((folder / "config.json").read_text())["dtype"]
    return {x.dtype for name, x in weights.items() if name not in biases}, {weights[x].dtype for x in biases}, said


@pytest.mark.parametrize("asked", ["auto", "bfloat16", "float16", "float32"])
def test_a_model_is_saved_as_its_source_or_as_asked_for(asked, run):
    output, said = run("--save_dtype", asked)
    name = "bfloat16" if asked == "auto" else asked
    dtype = getattr(torch, name)
    assert f"model saved to {output} in {name}" in said
    assert types(output) == ({dtype}, {torch.float32}, name)
    assert types(output / "checkpoint-2") == ({torch.float32}, {torch.float32}, "float32")
    exact, saved = (load_file(x / "model.safetensors") for x in (output / "checkpoint-2", output))
    assert exact.keys() == saved.keys() and "lm_head.weight" not in saved
    assert all(torch.equal(x if name.endswith(BIAS) else x.to(dtype), saved[name]) for name, x in exact.items())
    assert AutoModelForCausalLM.from_pretrained(output, dtype="auto").dtype == dtype


def test_a_resumed_run_ends_bitwise_alike_and_in_the_sources_type(run):
    """A checkpoint is in float32, as what it goes on with."""
    whole, _ = run()
    resumed, _ = run("--resume_from_checkpoint", whole / "checkpoint-1", name="resumed")
    one, other = (load_file(x / "model.safetensors") for x in (whole, resumed))
    assert types(resumed) == ({torch.bfloat16}, {torch.float32}, "bfloat16")
    assert all(torch.equal(other[name], x) for name, x in one.items())


def test_a_source_whose_config_is_silent_is_looked_at(run, source, tmp_path):
    model = save_model(tmp_path / "silent", AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16))
    config = json.loads((model / "config.json").read_text())
    del config["dtype"]
    (model / "config.json").write_text(json.dumps(config))
    assert types(run(model=model)[0])[0] == {torch.float16}


def test_weights_that_train_in_the_sources_type_are_saved_so(run):
    output, said = run("--dtype", "auto", "--router_bias_update_speed", "0")
    assert types(output)[0] == {torch.bfloat16} and "in bfloat16" in said


@pytest.mark.parametrize(
    ("words", "folder", "said"),
    [
        (["--ema_decay", 0.5], "ema", "model saved to {} in bfloat16, the average of its weights to {}/ema"),
        (
            ["--esft_p", 0.5, "--esft_merge", "true"],
            "merged",
            "rows of the trained experts saved to {}, the whole model to {}/merged",
        ),
    ],
    ids=["average", "merged"],
)
def test_other_whole_models_are_saved_so_too(words, folder, said, run):
    output, error = run(*words)
    assert types(output / folder) == ({torch.bfloat16}, {torch.float32}, "bfloat16")
    assert said.replace("{}", str(output)) in error


def test_an_adapter_stays_as_it_trains_and_lora_merge_says_what_it_merges_to(run):
    output, said = run("--lora_parts", "attention", "--lora_merge", "float32", "--save_dtype", "bfloat16")
    assert {x.dtype for x in load_file(output / "adapter_model.safetensors").values()} == {torch.float32}
    assert types(output / "merged") == ({torch.float32}, {torch.float32}, "float32")
    assert f"adapter saved to {output}, the whole model to {output}/merged" in said


def test_tied_weights_stay_one_tensor_and_others_do_not_become_one():
    whole = torch.randn(4, 6)
    state = cast({"a": whole, "b": whole.view(4, 6), "part": whole[:2], "ids": torch.arange(3)}, torch.bfloat16)
    assert state["a"] is state["b"] and state["part"].shape == (2, 6) and state["ids"].dtype == torch.int64
