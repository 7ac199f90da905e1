"""What a run says of itself: one line a log on standard error, and all of the log in its state."""

import json
import re

import pytest
from hf_moe.training.main import main
from hf_moe.training.stages.progress import line

from .policies import run_tiny, save_model

TRAINED = {"loss": 5.46712, "learning_rate": 1e-3, "grad_norm": 3.0, "router_load_max": 1.5764, "z_loss": 1.9}
TRAINED |= {"router_load_entropy": 0.8899, "router_dead_experts": 0.0, "entropy": 2.1, "epoch": 0.1}
HELD_OUT = {"eval_a_loss": 8.8163, "eval_a_router_load_max": 1.5, "eval_a_z_loss": 7.0, "eval_a_runtime": 0.2}
ENDED = {"train_runtime": 12.4, "train_samples_per_second": 40.12, "train_loss": 5.0, "total_flos": 1e9}


@pytest.mark.parametrize(
    ("logs", "said"),
    [
        (TRAINED, "step   7/120: loss 5.467, lr 0.001, busiest expert 1.576x, load entropy 0.8899, dead 0"),
        (HELD_OUT, "step   7/120: held-out loss of a 8.816, busiest expert 1.5x"),
        (ENDED, "step   7/120: trained for 12 s, 40.1 rows a second"),
        ({"reward": 0.25, "rewards/x/mean": 0.25, "kl": 0.0}, "step   7/120: reward 0.25"),
        ({"eval_b_runtime": 1.0}, None),
    ],
    ids=["training", "held-out", "end", "reward", "nothing"],
)
def test_a_log_in_a_line(logs, said):
    assert line(logs, 7, 120, {"eval_a_loss": "held-out loss of a"}) == said


@pytest.mark.parametrize("bar", ["false", "true"], ids=["bar", "no-bar"])
def test_a_run_says_lines_and_no_dictionaries(bar, model_folder, data_folder, tmp_path, capsys):
    given = {"model_name_or_path": model_folder, "output_dir": tmp_path / "out", "disable_tqdm": bar, "max_steps": 2}
    given |= {"train_data": data_folder / "train.jsonl", "eval_data": data_folder / "val.jsonl", "logging_steps": 1}
    main(["tiny/sft", *(f"--{key}={value}" for key, value in given.items()), "--save_strategy=no"])
    out, err = capsys.readouterr()
    assert "{" not in out + err
    assert re.findall(r"step (\d)/2: (held-out loss|loss|trained) ", err) == [
        ("0", "held-out loss"),
        ("1", "loss"),
        ("2", "loss"),
        ("2", "trained"),
        ("2", "held-out loss"),
    ]
    assert ("|" in err.split("step 1/2")[1].split("step 2/2")[0]) == (bar == "false")
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert {"router_max_violation", "z_loss", "grad_norm", "aux_loss"} <= history[1].keys()


def test_a_reward_and_a_margin_are_said(tmp_path, capsys):
    model = save_model(tmp_path / "model")
    for stage, word in (("dpo", "margin"), ("grpo", "reward")):
        run_tiny(stage, model, tmp_path / stage, "--max_steps", 1, "--save_steps", 1)
        said = [x for x in capsys.readouterr().err.splitlines() if x.startswith("step 1/1: loss")]
        assert len(said) == 1 and f"{word} " in said[0] and "lr " in said[0]
