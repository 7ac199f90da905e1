"""In which type a run saves: the source's or the one asked for; checkpoints are as exact as what trains."""

import json

import pytest
import torch
from hf_moe.conversion.files.block_fp8 import BlockFP8Checkpoint
from hf_moe.training.main import main
from hf_moe.training.output.block_fp8 import to_blocks
from hf_moe.training.output.saved_dtype import cast
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_moe.kernels.fp8.format import blocks_of

from .models import deepseek_v3, hf_moe_biased
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


def test_block_fp8_is_what_releases_are_and_loads_again(run, data_folder, tmp_path):
    """In several files as in one, by Transformers and by `hf-moe import`'s reader."""
    wide = {**BYTES, "hidden_size": 128, "moe_intermediate_size": 256, "intermediate_size": 144}
    model = save_model(tmp_path / "deepseek", deepseek_v3(**wide, first_k_dense_replace=1))
    output, said = run("--save_dtype", "fp8", model=model)
    assert "in float8_e4m3fn" in said
    exact = AutoModelForCausalLM.from_pretrained(output / "checkpoint-2").state_dict()
    weights, config = load_file(output / "model.safetensors"), json.loads((output / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization["weight_block_size"] == [128, 128] and quantization["quant_method"] == "fp8"
    assert "lm_head" in quantization["modules_to_not_convert"]
    name = "model.layers.1.mlp.experts.1.down_proj.weight"
    expected = blocks_of(exact["model.layers.1.mlp.experts.down_proj"][1].bfloat16())
    assert torch.equal(weights[name].float(), expected.codes[0].float())
    assert torch.equal(weights[f"{name}_scale_inv"], expected.scales[0]) and expected.scales.shape == (1, 1, 2)
    in_codes = {key for key, x in weights.items() if x.dtype == torch.float8_e4m3fn}
    assert {key.removesuffix("_scale_inv") for key in weights if key.endswith("_scale_inv")} == in_codes
    plain = ("embed_tokens", "lm_head", "norm", ".gate.weight", "scale_inv", BIAS)
    plain += ("layers.0.mlp.",)  # 144 is more than one block, and not whole ones
    assert in_codes == {key for key in weights if not any(part in key for part in plain)}
    loaded = AutoModelForCausalLM.from_pretrained(output).state_dict()
    for key, x in loaded.items():
        assert (x.float() - exact[key].float()).norm() <= 0.03 * exact[key].float().norm(), key
    read = BlockFP8Checkpoint(output, (128, 128))
    torch.testing.assert_close(read.tensor(name), loaded["model.layers.1.mlp.experts.down_proj"][1])

    split = tmp_path / "split"
    model = AutoModelForCausalLM.from_pretrained(output / "checkpoint-2", dtype=torch.bfloat16)
    model.save_pretrained(split, max_shard_size="300KB")
    to_blocks(split)
    index = json.loads((split / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 1 and index.keys() == weights.keys()
    for file in set(index.values()):
        for key, x in load_file(split / file).items():
            assert index[key] == file
            assert ".gate." in key or torch.equal(x.float(), weights[key].float()), key  # routers load in float32


def test_block_fp8_is_refused_where_experts_lie_together(run, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_moe.training.stages.loading.whole_model", None)
    with pytest.raises(ValueError, match=r"save_dtype is fp8.*those of hf_moe all experts together: save in"):
        run("--save_dtype", "fp8")
