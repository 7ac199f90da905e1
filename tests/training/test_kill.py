"""Killed at a random step and resumed, `hf-moe train` ends bitwise where the unbroken run ends, on 1 and 2 processes.

HF_MOE_KILLS=N in the environment runs each case on both, killed N times at a random moment rather than in a step.
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_moe.training.host import CLIPS_EXPERT_PARALLEL
from safetensors.torch import load_file

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from tests.conftest import since

from .conftest import SIZES, tiny_tokenizer
from .models import BIASED

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
RUN = ["--max_steps", STEPS, "--save_steps", 2, "--save_total_limit", 9, "--per_device_train_batch_size", 2]
RUN += ["--learning_rate", "1e-2", "--lr_scheduler_type", "constant", "--logging_steps", 1]
LORA = ["--lora_parts", "attention", "routed_experts", "--lora_r", 2]
# Name -> whether selection biases move, arguments, files at the end.
CASES = {
    "full": (False, [], ["model.safetensors"]),
    "bias": (True, ["--gradient_accumulation_steps", 2], ["model.safetensors"]),
    "lora": (True, LORA, ["adapter_model.safetensors", "router_bias.safetensors"]),
    "esft": (True, ["--esft_p", 0.4, "--esft_batches", 2], ["expert_rows.safetensors", "router_bias.safetensors"]),
    "expert_parallel": (
        True,
        ["--expert_parallel_size", 2, "--save_dtype", "bfloat16"],
        [f"checkpoint-{STEPS}/model.safetensors", "model.safetensors"],
    ),
}
if not CLIPS_EXPERT_PARALLEL:  # an older host, on which it is refused
    del CASES["expert_parallel"]
KILLS = int(os.environ.get("HF_MOE_KILLS", "0"))
RUNS = [("full", 2), ("bias", 1), ("lora", 1), ("esft", 2), ("expert_parallel", 2)]
RUNS = [(name, processes) for name, processes in RUNS if name in CASES]
if KILLS:
    RUNS = [(name, processes) for name in CASES for processes in (1, 2) if processes == 2 or name != "expert_parallel"]


def save_model(folder: Path, biased: bool) -> None:
    """A tiny model with random routes and dropout, so that a random state that was not restored shows."""
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 12, "num_attention_heads": 2, "num_hidden_layers": 1, "num_experts": 6}
    changes = BIASED | {"router_bias_update_speed": 1e-2} if biased else {}
    changes["router_args"] = {**changes.get("router_args", {}), "jitter": 0.3}
    HfMoeForCausalLM(HfMoeConfig(**sizes, **changes, attention_dropout=0.2)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data_folder):
    """The folder of all runs, and how the processes of each killed one ended."""
    folder = tmp_path_factory.mktemp("killed")
    for biased in (False, True):
        save_model(folder / f"model-{biased}", biased)
    jobs = {}
    for name, processes in RUNS:
        biased, extra, _ = CASES[name]
        places = ["--model_name_or_path", folder / f"model-{biased}", "--train_data", data_folder / "train.jsonl"]
        job = {"argv": [str(word) for word in ("tiny/sft", *places, *RUN, *extra)], "processes": processes}
        output = str(folder / f"{name}-{processes}")
        how = {"kills": KILLS} if KILLS else {"step": random.SystemRandom().randint(2, STEPS - 1)}
        jobs[f"{name}-{processes}-unbroken"] = job | {"output": f"{output}-unbroken"}
        jobs[f"{name}-{processes}"] = job | how | {"output": output}
    (folder / "jobs.json").write_text(json.dumps(list(jobs.values())))
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, str(ROOT / "tests/training/kill_worker.py"), str(folder / "jobs.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    ended = dict(zip(jobs, json.loads(result.stdout.splitlines()[-1]), strict=True))
    return folder, ended, result.stderr


def losses(run: Path) -> list[float]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    found = [entry["loss"] for entry in history if "loss" in entry]
    assert len(found) == STEPS
    return found


@pytest.mark.parametrize(("name", "processes"), RUNS)
def test_killed_and_resumed_run_ends_bitwise_where_the_unbroken_one_ends(runs, name, processes):
    folder, ended, messages = runs
    run = f"{name}-{processes}"
    killed, finished = ended[run][:-1], ended[run][-1]
    assert ended[f"{run}-unbroken"] == [[0] * processes] and finished == [0] * processes, messages[-3000:]
    assert (KILLS or len(killed) == 1) and all(-9 in codes for codes in killed)
    assert losses(folder / run) == losses(folder / f"{run}-unbroken")
    for file in CASES[name][2]:
        unbroken, resumed = (load_file(folder / end / file) for end in (f"{run}-unbroken", run))
        assert unbroken.keys() == resumed.keys()
        assert all(torch.equal(resumed[key], weight) for key, weight in unbroken.items()), file


@since(23, "recipes refuse expert parallelism")
def test_experts_that_were_split_are_saved_in_the_type_that_was_asked_for(runs):
    folder = runs[0] / "expert_parallel-2"
    trained, saved = (load_file(path / "model.safetensors") for path in (folder / f"checkpoint-{STEPS}", folder))
    assert trained.keys() == saved.keys()
    for name, x in trained.items():
        assert x.dtype == torch.float32
        assert torch.equal(saved[name], x if name.endswith("e_score_correction_bias") else x.bfloat16()), name
