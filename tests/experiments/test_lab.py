"""The lab: every experiment runs, leaves files and a verdict, goes on where it was stopped, and judges as it says."""

import json
from dataclasses import replace

import pytest
from hf_moe.experiments import data, page, runner
from hf_moe.experiments.claims import EXPERIMENTS
from hf_moe.experiments.experiment import (
    BUDGETS,
    DOES_NOT,
    HOLDS,
    UNDECIDED,
    Arm,
    Experiment,
    both,
    lower,
    mean,
    spread,
)
from hf_moe.experiments.training import config_of, train

from hf_moe.model.routing import ROUTERS
from hf_moe.plugins import load_plugin
from tests.cli.conftest import command  # noqa: F401  (a fixture)
from tests.plugins.conftest import FOLDER, forgotten  # noqa: F401  (a fixture)

FEW = replace(BUDGETS["tiny"], steps=3, rows=4, held_out=8, seeds=2)
ONE = replace(FEW, seeds=1)


@pytest.fixture
def here(monkeypatch):
    """Runs one after the other in this process; what was run."""
    done = []

    def work(jobs, keep, progress):
        for job in jobs:
            done.append((job.arm, job.seed))
            keep(train(job))

    monkeypatch.setattr(runner, "work", work)
    return done


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_leaves_its_files_and_a_verdict(name, here, tmp_path):
    experiment = EXPERIMENTS[name]
    result = runner.run(name, experiment, ONE, None, tmp_path, progress=False)
    assert len(here) == len(experiment.arms(ONE)) >= 2
    assert result["verdict"] in (HOLDS, DOES_NOT, UNDECIDED, "see the table")
    runs = runner.by_arm(result["runs"], experiment.arms(ONE))
    files = page.write(result, runs, tmp_path)
    text = files[0].read_text()
    assert result["claim"] in text and result["verdict"] in text and result["paper"] in text
    assert all(f"| {arm} |" in text for arm in runs)
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(result))
    assert all(0 < run["held_out_loss"] < 10 and len(run["losses"]) == 3 for run in result["runs"])
    assert "http" in experiment.source or name == "board"


def test_what_is_done_is_not_done_again(here, tmp_path, monkeypatch):
    experiment = EXPERIMENTS["no-balancing"]
    keep_two = []

    def work(jobs, keep, progress):
        for job in jobs[:2]:
            keep_two.append((job.arm, job.seed))
            keep(train(job))
        raise KeyboardInterrupt

    serial = runner.work
    monkeypatch.setattr(runner, "work", work)
    with pytest.raises(KeyboardInterrupt):
        runner.run("no-balancing", experiment, FEW, None, tmp_path, progress=False)
    monkeypatch.setattr(runner, "work", serial)
    stopped = runner.run("no-balancing", experiment, FEW, None, tmp_path, progress=False)
    assert sorted(keep_two + here) == sorted((arm, seed) for arm in experiment.arms(FEW) for seed in (0, 1))
    unbroken = runner.run("no-balancing", experiment, FEW, None, tmp_path / "other", progress=False)
    for run in (stopped, unbroken):
        run["runs"] = sorted(run["runs"], key=lambda x: (x["arm"], x["seed"]))
        for measured in run["runs"]:
            del measured["step_ms"]
    assert stopped == unbroken
    del here[:]
    runner.run("no-balancing", experiment, FEW, None, tmp_path, progress=False)
    assert not here
    with pytest.raises(ValueError, match="is of a run with another budget: name another --out"):
        runner.run("no-balancing", experiment, replace(FEW, steps=4), None, tmp_path, progress=False)


def test_arms_differ_in_what_they_say_alone(here, tmp_path):
    """The same rows in the same order, from the same weights."""
    twins = Experiment("c", "s", "p", lambda budget: {"a": Arm(), "b": Arm()}, lambda runs: lower(runs, "a", "b"))
    result = runner.run("twins", twins, FEW, None, tmp_path, progress=False)
    runs = runner.by_arm(result["runs"], twins.arms(FEW))
    for one, other in zip(runs["a"], runs["b"], strict=True):
        assert one["losses"] == other["losses"] and one["held_out_loss"] == other["held_out_loss"]
    assert runs["a"][0]["losses"] != runs["a"][1]["losses"] and result["verdict"] == UNDECIDED


def test_arms_that_are_not_equal_are_refused(here, tmp_path):
    arms = {"a": Arm(), "b": Arm({"moe_intermediate_size": 96})}
    unequal = Experiment("c", "s", "p", lambda budget: arms, lambda runs: HOLDS, equal="flops_per_token")
    with pytest.raises(ValueError, match="The arms must have equal flops_per_token, but have"):
        runner.run("unequal", unequal, ONE, None, tmp_path, progress=False)
    assert not here


def test_verdicts():
    def runs(**arms):
        return {arm: [{"held_out_loss": x} for x in losses] for arm, losses in arms.items()}

    assert lower(runs(a=[1.0, 1.1, 1.2], b=[2.0, 2.1, 2.2]), "a", "b") == HOLDS
    assert lower(runs(a=[2.0, 2.1, 2.2], b=[1.0, 1.1, 1.2]), "a", "b") == DOES_NOT
    assert lower(runs(a=[1.0, 2.0, 3.0], b=[2.0, 1.0, 3.1]), "a", "b") == UNDECIDED
    assert lower(runs(a=[1.0, 1.0], b=[1.5, 1.4]), "a", "b") == HOLDS
    assert lower(runs(a=[1.0, 1.0], b=[1.005, 1.4]), "a", "b") == UNDECIDED
    assert lower(runs(a=[1.0], b=[1.5]), "a", "b") == HOLDS
    assert both(HOLDS, HOLDS) == HOLDS and both(HOLDS, UNDECIDED) == UNDECIDED
    assert both(UNDECIDED, DOES_NOT) == DOES_NOT
    assert mean([{"x": 1.0}, {"x": 3.0}], "x") == 2 and spread([{"x": 1.0}, {"x": 3.0}], "x") == pytest.approx(2**0.5)


def test_every_router_is_on_the_board(forgotten):  # noqa: F811
    load_plugin(FOLDER / "my_top_p.py")
    arms = EXPERIMENTS["board"].arms(ONE)
    assert set(ROUTERS) <= set(arms) and "my_top_p" in arms
    assert runner.loaded_plugins() == (str(FOLDER / "my_top_p.py"),)
    for arm in arms.values():
        config_of(arm, ONE)


def test_held_out_rows_are_none_of_the_training_ones(tmp_path):
    rows, held_out = data.rows_of(None, FEW)
    assert rows.shape == (12, 64) and held_out.shape == (8, 64)
    assert not any((rows == row).all(dim=1).any() for row in held_out)
    lines = [json.dumps({"text": f"Line {i} of a text. " * 9}) for i in range(90)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    mine, _ = data.rows_of(str(tmp_path / "text.jsonl"), FEW)
    assert mine.shape == rows.shape
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(ValueError, match="has 10 characters, and this budget reads"):
        data.rows_of(str(tmp_path / "short.txt"), FEW)


def test_the_command(command, here, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setitem(BUDGETS, "tiny", ONE)
    code, out, err = command("lab", "--list")
    assert code == 0 and all(name in out for name in EXPERIMENTS), err
    code, out, err = command("lab", "hash", "--out", tmp_path / "hash")
    assert code == 0 and "held-out loss" in out and str(tmp_path / "hash" / "page.md") in out, err
    for words, said in (
        (["nothing", "--out", tmp_path], "There is no experiment 'nothing'; there are board"),
        (["hash"], "--out is missing"),
        (["hash", "--out", tmp_path, "--budget", "huge"], "There is no budget 'huge'"),
        (["hash", "--out", tmp_path, "--seeds", 0], "--seeds is 0"),
    ):
        code, out, err = command("lab", *words)
        assert code == 2 and out == "" and said in err and err.count("\n") == 1
