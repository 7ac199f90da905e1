"""Launch files and what starts with them; that they train is in test_parallel.py."""

import sys

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from hf_moe.training.launch import find_launch_file, launch, shipped_launch_files
from hf_moe.training.stages.loading import ModelArguments, expert_parallel
from hf_moe.training.stages.trained import check_choices
from hf_moe.training.weights.adapters import AdapterArguments
from hf_moe.training.weights.esft import EsftArguments

from tests.conftest import since

KINDS = {
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
    "expert_parallel": DistributedType.MULTI_GPU,
    "pipeline": DistributedType.MULTI_GPU,
}


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_reads_the_file(name):
    assert shipped_launch_files().keys() == KINDS.keys()
    config = load_config_from_file(str(find_launch_file(name)))
    assert config.distributed_type == KINDS[name] and config.mixed_precision == "no"


def test_a_file_of_ones_own_and_an_unknown_name(tmp_path):
    (tmp_path / "mine.yaml").write_text("distributed_type: MULTI_GPU\n")
    assert find_launch_file(str(tmp_path / "mine.yaml")) == tmp_path / "mine.yaml"
    with pytest.raises(FileNotFoundError, match="No launch file zero9: give a file, or one of expert_parallel, fsdp2"):
        find_launch_file("zero9")


def test_training_starts_once_for_each_gpu(monkeypatch):
    started = []
    monkeypatch.setattr("os.execv", lambda *words: started.append(words))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    launch("fsdp2", ["recipe.yaml", "--max_steps", "2"])
    program, words = started[0]
    assert program == words[0] == sys.executable
    assert words[words.index("--num_processes") + 1] == "3"
    assert words[-6:] == ["--module", "hf_moe_cli", "train", "recipe.yaml", "--max_steps", "2"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="--accelerate fsdp2 starts a process for each GPU, and there is none"):
        launch("fsdp2", [])


def test_experts_are_split_over_processes_that_divide(monkeypatch):
    assert expert_parallel(1) == {}
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setattr("hf_moe.training.stages.loading.CLIPS_EXPERT_PARALLEL", False)  # as on an older host
    with pytest.raises(ValueError, match=r"expert_parallel_size is 4, which needs Transformers 5\.23"):
        expert_parallel(4)
    for size in (0, 3, 16):
        with pytest.raises(ValueError, match=f"expert_parallel_size is {size}, which does not divide the 8 processes"):
            expert_parallel(size)


@since(23, "expert parallelism is refused")
def test_experts_are_split_and_tokens_gathered(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    spread = expert_parallel(4)["distributed_config"]
    assert (spread.fsdp_size, spread.ep_size, spread.ep_implementation) == (8, 4, "hf_moe")


@pytest.mark.parametrize(
    ("adapter", "esft", "message"),
    [
        ({"lora_parts": ["attention"], "lora_merge": "float32"}, {}, "lora_merge is float32, which needs whole"),
        ({"lora_parts": ["attention"], "lora_base": "fp8"}, {}, "lora_base is fp8, which needs whole weights"),
        ({}, {"esft_p": 0.2, "esft_merge": True}, "esft_merge is True, which needs whole weights"),
    ],
    ids=["merge", "base", "esft"],
)
def test_what_needs_whole_weights_is_refused_where_they_are_sharded(monkeypatch, adapter, esft, message):
    choices = (ModelArguments(), AdapterArguments(**adapter), EsftArguments(**esft))
    check_choices(*choices)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=message):
        check_choices(*choices)


@pytest.mark.parametrize(
    ("adapter", "esft", "message"),
    [
        ({"lora_parts": ["attention", "routed_experts"]}, {}, "lora_parts is .*, which trains parts of experts, and"),
        ({}, {"esft_p": 0.2}, "esft_p is 0.2, which trains parts of experts, and expert_parallel_size is 2"),
        ({"lora_parts": ["attention"], "lora_merge": "float32"}, {}, "lora_merge is float32, which needs whole"),
    ],
    ids=["adapter", "esft", "merge"],
)
def test_what_needs_whole_experts_is_refused_where_they_are_split(adapter, esft, message):
    choices = (AdapterArguments(**adapter), EsftArguments(**esft))
    check_choices(ModelArguments(), *choices)
    with pytest.raises(ValueError, match=message):
        check_choices(ModelArguments(expert_parallel_size=2), *choices)
