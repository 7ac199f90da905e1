"""A kill of any reshaping at any line, of a family of Transformers' own and of calibrated ones, too, loses nothing."""

import multiprocessing
import os
import random
import signal

import pytest
from hf_moe.conversion import exchange_experts, grow, prune

from hf_moe.staging import staging_folder
from tests.conversion.conftest import files_of
from tests.conversion.kill_worker import convert
from tests.conversion.test_reshape import CASES, TEXT, build, ours, save

CALIBRATED = {"experts": 4, "calibration": "text.txt", "calibration_tokens": 60}
KEEPS_K = ("hf_moe", "deepseek_v3")  # with more experts, in groups
# The model lies in "model".
HOW = {
    "reap": (prune, CALIBRATED),
    "merge": (prune, CALIBRATED | {"merge": True}),
    "remove": (exchange_experts, {"remove": [2]}),
    "swap": (exchange_experts, {"swap": [(4, "model:1")]}),
}
# With HF_MOE_KILL_POINTS, which says how often each is killed, it is more of them, and of all families.
KILL_POINTS, FAMILIES = 2, ["qwen3_moe"]
if "HF_MOE_KILL_POINTS" in os.environ:
    KILL_POINTS, FAMILIES = int(os.environ["HF_MOE_KILL_POINTS"]), ["hf_moe", *CASES]
    HOW |= {
        "compared": (prune, CALIBRATED | {"by": "frequency", "verify": True, "data": ["text.txt"]}),
        "doubled": (grow, {"experts": 12, "top_k": 6}),
        "kept": (grow, {"experts": 18}),
        "add": (exchange_experts, {"add": ["model:2"]}),
    }


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    families = ("olmoe", "qwen3_moe", "deepseek_v3", "gpt_oss")
    models = [f"transformers.models.{name}.modeling_{name}" for name in families]
    context.set_forkserver_preload(["tests.conversion.kill_worker", *models])
    return context


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory):
    """A family's name and the folder of a tiny mixture of 6 experts, 3 a token, beside a text."""
    folder = tmp_path_factory.mktemp(request.param) / "model"
    (folder.parent / "text.txt").write_text(TEXT)
    if request.param == "hf_moe":
        return request.param, save(ours(), folder)
    model_type, fields = CASES[request.param]
    return request.param, save(build(model_type, **{**fields, "vocab_size": 512}), folder)


def run(processes, *arguments) -> int:
    process = processes.Process(target=convert, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("how", HOW)
def test_a_kill_at_any_line_loses_nothing(source, how, processes, tmp_path, monkeypatch):
    family, folder = source
    if how == "kept" and family not in KEEPS_K:
        pytest.skip("the family cannot hold it")
    monkeypatch.chdir(folder.parent)
    function, given = HOW[how]
    arguments = {"src": "model", "max_shard_size": "25KB", "verify": False, "progress": False, **given}
    whole = arguments | {"dst": tmp_path / "whole" / "out"}
    assert run(processes, function.__name__, whole, None, tmp_path / "counts") == 0
    expected = files_of(tmp_path / "whole")
    before, lines = map(int, (tmp_path / "counts").read_text().split())
    points, kept = random.Random(f"{family} {how}"), 0
    for point in range(KILL_POINTS):
        dst = tmp_path / str(point) / "out"
        # Most kills where something is on the disk already.
        line = points.randint(before if point % 8 else 1, lines)
        assert run(processes, function.__name__, arguments | {"dst": dst}, line) == -signal.SIGKILL
        written = {path: path.stat().st_mtime_ns for path in staging_folder(dst).glob("*.safetensors")}
        function(**arguments | {"dst": dst, "resume": True})
        assert files_of(tmp_path / str(point)) == expected, f"killed before line {line} of {lines}"
        kept += sum((dst / path.name).stat().st_mtime_ns == time for path, time in written.items())
    assert kept or KILL_POINTS < 8  # files that were not written again
