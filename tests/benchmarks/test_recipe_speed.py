"""The benchmark of recipes measures a run of the command, here a small one."""

import re
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import recipe_speed
from hf_moe import HfMoeConfig, kernels
from hf_moe.demo import DEMO_MODEL
from hf_moe.routers import captured, find_routers


@pytest.mark.parametrize("unsaved", [False, True])
def test_a_run_is_measured(tmp_path, monkeypatch, unsaved):
    monkeypatch.setitem(recipe_speed.RUNS, "small", ("storyteller", 1, [*recipe_speed.TRAIN, "tiny/sft"]))
    shutil.copytree(DEMO_MODEL, tmp_path / "storyteller")
    recipe_speed.write_data(tmp_path / "chats.jsonl", 64, AutoTokenizer.from_pretrained(DEMO_MODEL))
    further = ["--chat_template_path", "plain", "--use_cpu", "true", "--max_length", "64", "--logging_steps", "1"]
    args = Namespace(
        work=tmp_path, steps=5, skip=1, rows=2, accumulation=1, gpus=None, further=further, unsaved=unsaved
    )
    found = recipe_speed.run("small", args)
    assert "failed" not in found, found
    assert len(found["step_seconds"]) == 4 and found["tokens_per_second"] > 0
    first = found["first_step_seconds"]  # of a run that ended by itself
    assert first is None if unsaved else 0 < first < found["until_first_step_seconds"]
    assert found["command"].startswith("hf_moe_cli train tiny/sft --model_name_or_path DIR/storyteller")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("name", ["olmoe-1b-7b", "qwen3-30b-a3b"])
def test_the_peer_has_the_same_weights(name):
    with torch.device("meta"):
        ours, peers = (
            AutoModelForCausalLM.from_config(recipe_speed.shape(model))
            for model in (name, f"{name}, Transformers' own")
        )
    assert sum(x.numel() for x in ours.parameters()) == sum(x.numel() for x in peers.parameters())
    assert max(x.numel() for x in ours.parameters()) == max(x.numel() for x in peers.parameters())


def test_time_that_spans_cover_is_counted_once():
    assert recipe_speed.covered([(5, 6), (0, 2), (1, 3)]) == 4


def test_more_gpus_split_the_experts_further(tmp_path):
    args = Namespace(work=tmp_path, rows=None, accumulation=None, gpus=4, further=["--expert_parallel_size", "2"])
    words = recipe_speed.words_of("sft, expert parallel", 3, args)
    assert [words[i + 1] for i, word in enumerate(words) if word == "--expert_parallel_size"] == ["4", "2"]
    assert recipe_speed.gpus_of("sft", args) == 1


def test_every_kernel_of_training_counts_as_experts():
    sources = "".join(path.read_text() for path in Path(kernels.__file__).parent.glob("*.py"))
    names = re.findall(r"^def (\w+_kernel)\(", sources, re.M)
    assert len(names) > 8
    for name in names:
        assert next(part for part, known in recipe_speed.PARTS.items() if re.search(known, name)) == "experts", name


def test_routers_of_random_weights_spread_tokens_of_other_texts():
    torch.manual_seed(0)
    config = HfMoeConfig.from_preset("olmoe-1b-7b")
    config.num_hidden_layers, config.hidden_size, config.moe_intermediate_size = 3, 256, 64
    config.num_attention_heads = config.num_key_value_heads = 4
    config.head_dim = 64
    model = AutoModelForCausalLM.from_config(config)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)

    def busiest(ids: torch.Tensor) -> float:
        """Load of each layer's busiest expert beside the mean load: 8 of 64 at most."""
        routers = find_routers(model)
        with torch.no_grad(), captured(routers, 8) as routings:
            model(input_ids=ids)
        loads = [routing.index_SK.flatten().bincount(minlength=64).float() for routing in routings.values()]
        return max((load.max() / load.mean()).item() for load in loads)

    ids = recipe_speed.some_tokens(tokenizer, rows=8, length=128)
    other = ids[:, torch.randperm(128)]
    before = busiest(other)
    recipe_speed.even_routers(model, ids)
    assert busiest(other) < 0.8 * before


def test_the_line_that_says_why_a_run_failed_is_found():
    assert recipe_speed.FAILED.match("[rank1]: torch.OutOfMemoryError: CUDA out of memory.")
    assert recipe_speed.FAILED.match("hf-moe: --accelerate fsdp2 starts a process for each GPU, and there is none.")
    assert not recipe_speed.FAILED.match("[rank1]:   File x.py, line 3, in main")
