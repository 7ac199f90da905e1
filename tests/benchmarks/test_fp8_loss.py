"""Its runs have curves, in bf16, as there is no FP8 on a CPU; what it sums up."""

import json
import sys

import pytest

from benchmarks import fp8_loss


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setattr(fp8_loss, "SIZES", fp8_loss.SIZES | {"hidden_size": 128, "num_hidden_layers": 1})
    monkeypatch.setattr(fp8_loss, "ROWS", 2)
    monkeypatch.setattr(fp8_loss, "LENGTH", 32)
    monkeypatch.setattr(fp8_loss, "HELD_OUT", 4)
    rows = [{"text": f"{number} and {number + 1} are {2 * number + 1}. " * 8} for number in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_a_run_has_a_curve(work, monkeypatch):
    args = ["fp8_loss.py", "--data", str(work / "texts.jsonl"), "--work", str(work), "--out", str(work / "out.json")]
    monkeypatch.setattr(fp8_loss, "ProcessPoolExecutor", lambda *_: pytest.fail("prepared"))
    monkeypatch.setattr(sys, "argv", args)
    with pytest.raises(pytest.fail.Exception, match="prepared"):
        fp8_loss.main()
    points = fp8_loss.curve(work, "bf16", 0, 4)
    assert [step for step, _ in points] == [0, 1, 2, 3, 4, 4]
    assert points[-1][1] < points[0][1]


def test_seeds_are_compared_one_by_one():
    runs = {f"bf16-{seed}": [[0, 9.0], [1, 2.0 + seed]] for seed in range(2)}
    runs |= {f"fp8-{seed}": [[0, 9.0], [1, (2.0 + seed) * 1.01]] for seed in range(2)}
    found = fp8_loss.summed_up(runs, 2)
    assert found["percent_above_bf16"] == [1.0, 1.0] and found["percent_of_means"] == 1.0
    assert found["held_out_loss"] == {"bf16": 2.5, "fp8": 2.525}
