"""Sharded over two CPU processes, a run has the losses, weights and selection biases of one process.

FSDP2, DeepSpeed's ZeRO (where it is installed) and Transformers' expert parallelism, by the launch files that ship.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from accelerate.utils import is_deepspeed_available
from hf_moe.training.launch import LAUNCH_FILES
from hf_moe.training.weights.average import AVERAGE_FILE
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import since
from tests.processes import on_two_processes

from .shard_worker import CASES, DECAY, RESUMED, found, run

ROOT = Path(__file__).resolve().parents[2]
ON_A_CPU = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}  # whatever this machine has
ZERO = pytest.mark.skipif(not is_deepspeed_available(), reason="needs deepspeed")
TORCHAO = find_spec("torchao") is not None
needs_torchao = pytest.mark.skipif(not TORCHAO, reason="needs torchao: pip install 'hf_moe[float8]'")
LAYOUTS = ["fsdp2", pytest.param("zero2", marks=ZERO), pytest.param("zero3", marks=ZERO)]
ZERO_HAS_NO = ("bf16", "fp8", "8 bits", "muon", "average")
# ESFT by `specialise`; DeepSpeed has a precision of its own.
REFUSED = {("zero3", "esft"), *((zero, name) for zero in ("zero2", "zero3") for name in ZERO_HAS_NO)}


@pytest.fixture(scope="module", params=LAYOUTS)
def sharded(request, tmp_path_factory):
    """The folder with what two processes found, in every case."""
    folder = tmp_path_factory.mktemp(request.param)
    cases = [name for name in CASES if (request.param, name) not in REFUSED and (TORCHAO or name != "8 bits")]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    launch += ["--config_file", str(LAUNCH_FILES / f"{request.param}.yaml")]
    result = subprocess.run(
        [*launch, str(ROOT / "tests/training/shard_worker.py"), str(folder), *cases],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **ON_A_CPU},
        capture_output=True,
        text=True,
        timeout=600,  # an idle expert that some process waits for would never end
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The same in this process, each case when it is asked for."""
    folder, results = tmp_path_factory.mktemp("one"), {}

    def result(name: str) -> tuple[dict, Path]:
        if name not in results:
            results[name] = found(run(name, folder / name, processes=1))
        return results[name], folder / name / "final"

    return result


def assert_same_run(results: list[dict], expected: dict) -> None:
    for result in results:
        for entry, other in zip(result["history"], expected["history"], strict=True):
            assert entry == pytest.approx(other, rel=1e-5)
        assert result["biases"] == expected["biases"]


def assert_close(folder: Path, expected: Path, name: str, close: float = 1e-4) -> None:
    """Adam divides by the size of the gradient, so that the rounding of small ones shows."""
    actual, expected = (load_file(path / name) for path in (folder, expected))
    assert expected.keys() <= actual.keys() <= expected.keys() | {"lm_head.weight"}  # which may be tied
    for key, weight in expected.items():
        assert (actual[key].float() - weight.float()).norm() <= close * weight.float().norm(), key


@pytest.mark.parametrize("sharded", ["fsdp2"], indirect=True)
def test_sharded_run_in_bf16_begins_as_that_of_one_process(sharded, one_process):
    """Nothing is rounded but what autocast rounds; later steps differ by what rounding a sum's parts makes of it."""
    expected, _ = one_process("bf16")
    for result in json.loads((sharded / "bf16.json").read_text()):
        assert result["history"][0] == pytest.approx(expected["history"][0], rel=1e-4)


@pytest.mark.parametrize("sharded", ["fsdp2"], indirect=True)
def test_sharded_run_in_fp8_begins_as_that_of_one_process_and_resumes_bitwise(sharded, one_process):
    """Later steps differ: what a sum's order leaves in a weight may take another code."""
    expected, _ = one_process("fp8")
    first, second, resumed = json.loads((sharded / "fp8.json").read_text())
    for result in (first, second):
        assert result["history"][0] == pytest.approx(expected["history"][0], rel=1e-5)
        assert result["history"][1] == pytest.approx(expected["history"][1], rel=1e-2)
    assert resumed["history"][-1] == first["history"][-1]
    whole, again = (load_file(sharded / run / "final" / "model.safetensors") for run in ("fp8", "fp8-resumed"))
    assert all(torch.equal(again[key], weight) for key, weight in whole.items())


@pytest.mark.parametrize("sharded", ["fsdp2"], indirect=True)
def test_weights_are_gathered_once_a_step(sharded):
    """In two steps of two micro-batches, whose layers are computed twice: the experts of both layers in bf16."""
    for result in json.loads((sharded / "bf16.json").read_text()):
        assert result["gathers"] == {"torch.bfloat16": 2 * 2, "torch.float32": 2 * 4}


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("bf16", "fp8", "kernels", "8 bits")])
def test_sharded_run_is_that_of_one_process(sharded, one_process, name, request):
    """Losses, gradient norms, counts to 1e-5 and biases exactly, on each process; saved weights to 1e-4 of their norm.

    The resumed run's are those of the unbroken one bit for bit.
    """
    if (request.node.callspec.params["sharded"], name) in REFUSED:
        pytest.skip("refused")
    results = json.loads((sharded / f"{name}.json").read_text())
    expected, final = one_process(name)
    assert len(results) == (3 if name in RESUMED else 2)
    assert_same_run(results, expected)
    close = 5e-4 if name == "muon" else 1e-4  # which rounds sums of the processes' parts to bfloat16
    assert_close(sharded / name / "final", final, CASES[name][2], close)
    if name in RESUMED:
        whole, again = (load_file(sharded / run / "final" / CASES[name][2]) for run in (name, f"{name}-resumed"))
        assert all(torch.equal(again[key], weight) for key, weight in whole.items())
    assert not list((sharded / name / "final").glob("_fsdp*")), "the code of PyTorch beside the model"


@pytest.mark.parametrize("sharded", ["fsdp2"], indirect=True)
def test_average_of_shards_is_that_of_whole_weights(sharded):
    """Of the weights before the first step, and after each."""
    folder = sharded / "average"
    expected = {name: weight.detach().double() for name, weight in CASES["average"][0]().named_parameters()}
    for step in (1, 2):
        weights = load_file(folder / f"checkpoint-{step}" / "model.safetensors")
        expected = {name: DECAY * x + (1 - DECAY) * weights[name].double() for name, x in expected.items()}
        saved = load_file(folder / f"checkpoint-{step}" / AVERAGE_FILE)
        assert saved.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(saved[name].double(), value, rtol=1e-6, atol=1e-6)
    as_model = load_file(folder / "ema" / "model.safetensors")
    assert all(torch.equal(as_model[name], value) for name, value in saved.items())


@needs_torchao
@pytest.mark.parametrize("sharded", ["fsdp2"], indirect=True)
def test_moments_in_8_bits_go_on_as_they_were(sharded):
    first, second, resumed = json.loads((sharded / "8 bits.json").read_text())
    assert first["history"] == second["history"] and resumed["history"][-1] == first["history"][-1]
    whole, again = (load_file(sharded / run / "final" / "model.safetensors") for run in ("8 bits", "8 bits-resumed"))
    assert all(torch.equal(again[key], weight) for key, weight in whole.items())
    assert (sharded / "8 bits" / "checkpoint-1" / "optimizer").is_dir()


@needs_torchao
def test_a_step_in_8_bits_compiles():
    """And moves shards in bfloat16 as it moves the whole weight."""
    assert on_two_processes("training/eight_bit_worker.py") == [True, True]


def test_kernels_in_a_sharded_run_compute_what_transformers_does_in_one_process(sharded, one_process):
    expected, final = one_process("biased")
    assert_same_run(json.loads((sharded / "kernels.json").read_text()), expected)
    assert_close(sharded / "kernels" / "final", final, "model.safetensors")


def test_saved_folder_loads(sharded):
    for name in ("biased", "idle"):
        saved = AutoModelForCausalLM.from_pretrained(sharded / name / "final")
        weights = load_file(sharded / name / "final" / "model.safetensors")
        assert all(torch.equal(x, weights[key]) for key, x in saved.state_dict().items() if key in weights)


@since(23, "the gradient norm of expert parallelism leaves some out, and recipes refuse it")
@pytest.mark.parametrize("sharded", ["fsdp2"], indirect=True)
@pytest.mark.parametrize("name", ["biased", "held"])
def test_expert_parallel_run_is_that_of_one_process(sharded, one_process, name):
    expected, final = one_process(name)
    assert_same_run(json.loads((sharded / f"expert_parallel_{name}.json").read_text()), expected)
    assert_close(sharded / f"expert_parallel_{name}" / "final", final, "model.safetensors")


@since(23, "the gradient norm of expert parallelism leaves some out, and recipes refuse it")
@pytest.mark.parametrize("sharded", ["fsdp2"], indirect=True)
def test_expert_parallel_run_in_fp8_begins_as_that_of_one_process(sharded, one_process):
    """But for the gradients of weights: an expert's rows are those of both processes, and have other tiles."""
    expected, _ = one_process("fp8")
    first, second = json.loads((sharded / "expert_parallel_fp8.json").read_text())
    for result in (first, second):
        assert result["history"][0]["loss"] == pytest.approx(expected["history"][0]["loss"], rel=1e-5)
        assert result["history"][0]["grad_norm"] == pytest.approx(expected["history"][0]["grad_norm"], rel=0.02)
        assert result["history"][1]["loss"] == pytest.approx(expected["history"][1]["loss"], rel=0.02)


@since(23, "the gradient norm of expert parallelism leaves some out, and recipes refuse it")
@pytest.mark.parametrize("sharded", ["fsdp2"], indirect=True)
def test_expert_parallel_run_in_bf16_begins_as_that_of_one_process(sharded, one_process):
    expected, _ = one_process("bf16")
    for result in json.loads((sharded / "expert_parallel_bf16.json").read_text()):
        assert result["history"][0] == pytest.approx(expected["history"][0], rel=1e-4)
        assert result["sent"] == ["torch.bfloat16"]
        assert result["asked"] == 0  # how long the others' tokens are: rows are of one length
