"""The load is drawn from its seed, its texts are compared, and growing memory is seen."""

import pytest
import torch

from hf_moe import HfMoeForCausalLM
from tests.recordings import record_on_cpu

from .scripts import load, run

pytest.importorskip("llguidance")
TINY = ("--shape=tiny", "--dtype=float32")


def test_a_short_load_of_all_kinds(tmp_path, monkeypatch):
    """By steps as recorded ones in all but the graph."""
    record_on_cpu(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = run("mixed_load_gpu", monkeypatch, tmp_path / "out.json", *TINY, "--minutes=0.2")
    assert report["exit_code"] == 0 and report["failures"] == []
    assert report["requests"] > 20 and report["tokens"] > report["requests"]
    assert {"plain", "drafted", "guided", "cancelled", "streamed", "greedy", "sampled"} <= set(report["kinds"])
    assert len(report["memory"]["seconds"]) == report["requests"] // 5


def test_another_text_is_a_failure_that_can_be_made_again(tmp_path, monkeypatch):
    script = load("mixed_load_gpu", monkeypatch)
    most = script.MOST["tiny"]
    requests = [script.draw(0, number, most, 512) for number in range(20)]
    assert requests == [script.draw(0, number, most, 512) for number in range(20)]
    request = next(x for x in requests if x["mode"] == "plain" and not x["sampled"] and x["new"] > 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    generate = HfMoeForCausalLM.generate

    def wrong(model, disable_compile=False, **settings):
        text = generate(model, **settings)
        if not disable_compile:
            text[0, -2] = (text[0, -2] + 1) % 512
        return text

    monkeypatch.setattr(HfMoeForCausalLM, "generate", wrong)
    report = run("mixed_load_gpu", monkeypatch, tmp_path / "out.json", *TINY, f"--only={request['number']}")
    (failure,) = report["failures"]
    assert report["exit_code"] == report["requests"] == 1
    assert failure.startswith(f"request {request['number']} (plain, greedy") and "apart" in failure


@pytest.mark.parametrize(
    ("samples", "expected"),
    [([5000, 4000, 5010], True), ([100, 100, 100, 100], True), ([100, 100, 101, 103], False), ([7], True)],
    ids=["within", "equal", "grows", "one"],
)
def test_memory_that_grows_is_seen(samples, expected, monkeypatch):
    assert load("mixed_load_gpu", monkeypatch).flat(samples) is expected
