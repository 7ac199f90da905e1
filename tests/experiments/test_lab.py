"""The lab: every experiment runs, leaves files and a verdict, goes on where it was stopped, and judges as it says."""

import json
from dataclasses import replace

import pytest
import torch
from hf_moe.experiments import page, runner
from hf_moe.experiments.claims import EXPERIMENTS, against_dense, z_loss
from hf_moe.experiments.experiment import BUDGETS, Arm, Experiment
from hf_moe.experiments.text import IDS, Text, read_text
from hf_moe.experiments.trial import config_of, size_of, train
from hf_moe.experiments.verdicts import DOES_NOT, HOLDS, UNDECIDED, as_good, both, lower, mean, spread

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

    def work(jobs, progress):
        for keep, job in jobs:
            done.append((job.arm, job.seed))
            keep(train(job))

    monkeypatch.setattr(runner, "work", work)
    return done


def tried(name, experiment, budget, out) -> dict:
    begun = runner.Begun(name, experiment, budget, None, out)
    runner.run([begun], None, progress=False)
    return begun.judged()


def runs_of(result: dict) -> dict[str, list[dict]]:
    return {arm: [x for x in result["runs"] if x["arm"] == arm] for arm in result["arms"]}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_leaves_its_files_and_a_verdict(name, here, tmp_path):
    experiment = EXPERIMENTS[name]
    result = tried(name, experiment, ONE, tmp_path)
    assert len(here) == len(experiment.arms(ONE)) >= 2
    assert result["verdict"] in (HOLDS, DOES_NOT, UNDECIDED, "see the table")
    runs = runs_of(result)
    files = page.write(result, runs, tmp_path)
    text = files[0].read_text()
    assert result["claim"] in text and result["verdict"] in text and result["paper"] in text
    assert all(f"| {arm} |" in text for arm in runs)
    assert files[1].read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(result))
    steps = {name: arm.arguments.get("max_steps", ONE.steps) for name, arm in experiment.arms(ONE).items()}
    assert all(0 < run["held_out_loss"] < 10 and len(run["losses"]) == steps[run["arm"]] for run in result["runs"])
    assert "http" in experiment.source or name in ("board", "learning-rate")


def test_what_is_done_is_not_done_again(here, tmp_path, monkeypatch):
    experiment = EXPERIMENTS["no-balancing"]
    keep_two = []

    def work(jobs, progress):
        for keep, job in jobs[:2]:
            keep_two.append((job.arm, job.seed))
            keep(train(job))
        raise KeyboardInterrupt

    serial = runner.work
    monkeypatch.setattr(runner, "work", work)
    with pytest.raises(KeyboardInterrupt):
        tried("no-balancing", experiment, FEW, tmp_path)
    monkeypatch.setattr(runner, "work", serial)
    stopped = tried("no-balancing", experiment, FEW, tmp_path)
    assert sorted(keep_two + here) == sorted((arm, seed) for arm in experiment.arms(FEW) for seed in (0, 1))
    unbroken = tried("no-balancing", experiment, FEW, tmp_path / "other")
    for run in (stopped, unbroken):
        run["runs"] = sorted(run["runs"], key=lambda x: (x["arm"], x["seed"]))
        for measured in run["runs"]:
            del measured["step_ms"]
    assert stopped == unbroken
    del here[:]
    tried("no-balancing", experiment, FEW, tmp_path)
    assert not here
    with pytest.raises(ValueError, match="is of a run with another budget: name another --out"):
        tried("no-balancing", experiment, replace(FEW, steps=4), tmp_path)


def test_arms_differ_in_what_they_say_alone(here, tmp_path):
    """The same rows in the same order, from the same weights."""
    twins = Experiment("c", "s", "p", lambda budget: {"a": Arm(), "b": Arm()}, lambda runs: lower(runs, "a", "b"))
    result = tried("twins", twins, FEW, tmp_path)
    runs = runs_of(result)
    for one, other in zip(runs["a"], runs["b"], strict=True):
        assert one["losses"] == other["losses"] and one["held_out_loss"] == other["held_out_loss"]
    assert runs["a"][0]["losses"] != runs["a"][1]["losses"] and result["verdict"] == UNDECIDED


def test_arms_that_are_not_equal_are_refused(here, tmp_path):
    arms = {"a": Arm(), "b": Arm({"moe_intermediate_size": 96})}
    unequal = Experiment("c", "s", "p", lambda budget: arms, lambda runs: HOLDS, equal="training_flops")
    with pytest.raises(ValueError, match="The arms must have equal training_flops, but have"):
        tried("unequal", unequal, ONE, tmp_path)
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
    assert as_good(runs(a=[1.0, 1.0, 1.005], b=[1.0, 1.0, 1.0]), "a", "b") == HOLDS
    assert as_good(runs(a=[1.1, 1.1, 1.11], b=[1.0, 1.0, 1.0]), "a", "b") == DOES_NOT
    assert as_good(runs(a=[1.0, 1.2, 0.9], b=[1.0, 1.0, 1.0]), "a", "b") == UNDECIDED
    assert as_good(runs(a=[1.0, 1.005], b=[1.0, 1.0]), "a", "b") == HOLDS
    assert as_good(runs(a=[1.0, 1.5], b=[1.0, 1.0]), "a", "b") == UNDECIDED
    assert as_good(runs(a=[1.5, 1.5], b=[1.0, 1.0]), "a", "b") == DOES_NOT
    assert both(HOLDS, HOLDS) == HOLDS and both(HOLDS, UNDECIDED) == UNDECIDED
    assert both(UNDECIDED, DOES_NOT) == DOES_NOT
    assert mean([{"x": 1.0}, {"x": 3.0}], "x") == 2 and spread([{"x": 1.0}, {"x": 3.0}], "x") == pytest.approx(2**0.5)


def test_every_router_is_on_the_board(forgotten):  # noqa: F811
    load_plugin(FOLDER / "my_top_p.py")
    arms = EXPERIMENTS["board"].arms(ONE)
    assert set(ROUTERS) <= set(arms) and "my_top_p" in arms
    assert runner.loaded_plugins() == (str(FOLDER / "my_top_p.py"),)
    for arm in arms.values():
        config_of(arm.fields, ONE)


def test_held_out_rows_are_none_of_the_training_ones(tmp_path):
    text = read_text(None, FEW)
    assert text.rows.shape == (12, 64) and text.held_out.shape == (8, 64)
    assert not any((text.rows == row).all(dim=1).any() for row in text.held_out)
    lines = [json.dumps({"text": f"Line {i} of a text. " * 9}) for i in range(90)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    assert read_text(str(tmp_path / "text.jsonl"), FEW).rows.shape == text.rows.shape
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(ValueError, match="has 9 tokens, and this budget reads 1,280"):
        read_text(str(tmp_path / "short.txt"), FEW)


def test_a_vocabulary_is_learnt_from_the_text_and_kept(tmp_path):
    text = read_text(None, replace(FEW, vocabulary=400))
    text.save(tmp_path)
    again = Text.load(tmp_path)
    assert torch.equal(text.rows, again.rows) and torch.equal(text.held_out, again.held_out)
    assert 300 < len(again.tokenizer) <= 400 and text.rows.max() < 400
    ids = {name: getattr(again.tokenizer, name) for name in IDS}
    assert ids == IDS == {name: getattr(read_text(None, FEW).tokenizer, name) for name in IDS}
    written = again.tokenizer.decode(text.rows[:4].flatten())
    assert "Once upon a time there was a" in written and "The end.</s>" in written


def test_the_share_of_its_steps_after_which_a_mixture_is_there():
    runs = {"mixture": [{"losses": [4.0, 3.0, 2.0, 1.0]}], "dense": [{"losses": [5.0, 4.0, 3.0, 2.0]}]}
    assert against_dense.reached(runs) == 0.75 and "75%" in against_dense.says(runs)[0]
    runs["mixture"] = [{"losses": [5.0] * 4}]
    assert against_dense.reached(runs) is None and "did not reach" in against_dense.says(runs)[0]


def test_spikes_are_counted():
    calm = [3.0 + 0.01 * (-1) ** i for i in range(60)]
    assert z_loss.spikes(calm) == 0 == z_loss.spikes(calm[:5])
    assert z_loss.spikes([*calm, 5.0, *calm]) == 1
    assert "a 1, b 0" in z_loss.says({"a": [{"losses": [*calm, 5.0]}], "b": [{"losses": calm}]})[0]


def test_numbers_of_trained_models(here, tmp_path):
    """What experiments measure beside the losses."""

    def of(name: str) -> dict[str, list[dict]]:
        result = tried(name, EXPERIMENTS[name], ONE, tmp_path / name)
        return {x["arm"]: x for x in result["runs"]}

    found = of("capacity")
    assert found["no limit"]["moved_by_neighbours"] < 1e-4 < found["factor 1"]["moved_by_neighbours"]
    found = of("device-limit")
    groups = [found[name]["groups_a_token"] for name in ("1 group", "2 groups", "3 groups", "all groups")]
    assert groups[0] == 1 and groups == sorted(groups) and groups[1] <= 2 and groups[3] > 2
    found = of("mtp")
    assert found["without"]["tokens_a_forward"] == 1 <= found["with"]["tokens_a_forward"] <= 2
    assert 0 <= found["with"]["accepted_drafts"] <= 1
    found = of("upcycling")
    assert found["copy"]["loss_at_start"] == pytest.approx(found["dense"]["loss_at_start"], abs=1e-4)
    assert found["drop"]["loss_at_start"] != found["copy"]["loss_at_start"]
    found = of("expert-choice")["expert choice"]
    assert found["loss_with_the_choice_of_training"] != found["held_out_loss"]
    assert found["loss_with_the_choice_of_training"] == pytest.approx(found["held_out_loss"], rel=0.2)
    found = of("z-loss")
    assert found["without, bfloat16 router"]["held_out_loss"] != found["without"]["held_out_loss"]
    found = of("dense-only-tuning")
    assert (
        len({x["loss_at_start"] for x in found.values()}) == 1
        and len({x["held_out_loss"] for x in found.values()}) == 3
    )
    sizes = {name: size_of(arm, BUDGETS["gpu"]) for name, arm in EXPERIMENTS["mla-cache"].arms(BUDGETS["gpu"]).items()}
    cached = {name: size["kv_cache_bytes_per_token"] for name, size in sizes.items()}
    assert cached["MHA"] == 2 * cached["GQA"] == 4 * cached["MQA"] and cached["MLA"] < cached["GQA"]


def test_the_picture_of_dying_experts(here, tmp_path):
    experiment = EXPERIMENTS["no-balancing"]
    result = tried("no-balancing", experiment, ONE, tmp_path)
    files = page.write(result, runs_of(result), tmp_path)
    assert tmp_path / "experts.png" in files and "(experts.png)" in (tmp_path / "page.md").read_text()
    for run in result["runs"]:
        assert [step for step, *_ in run["shares"]] == [1, 2, 3]
        assert all(len(shares) == 8 and sum(shares) == pytest.approx(1, abs=1e-3) for _, *shares in run["shares"])


def test_the_command(command, here, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setitem(BUDGETS, "tiny", ONE)
    code, out, err = command("lab", "--list")
    assert code == 0 and all(name in out for name in EXPERIMENTS), err
    code, out, err = command("lab", "hash", "--out", tmp_path / "hash")
    assert code == 0 and "held-out loss" in out and str(tmp_path / "hash" / "page.md") in out, err
    code, out, err = command("lab", "hash", "no-balancing", "--out", tmp_path / "both")
    assert code == 0 and out.count("held-out loss") == 2, err
    assert all((tmp_path / "both" / name / "page.md").is_file() for name in ("hash", "no-balancing"))
    for words, said in (
        (["nothing", "--out", tmp_path], "There is no experiment 'nothing'; there are board"),
        (["hash"], "--out is missing"),
        (["hash", "--out", tmp_path, "--budget", "huge"], "There is no budget 'huge'"),
        (["hash", "--out", tmp_path, "--seeds", 0], "--seeds is 0"),
    ):
        code, out, err = command("lab", *words)
        assert code == 2 and out == "" and said in err and err.count("\n") == 1
