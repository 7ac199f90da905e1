"""What a plugin adds beside routers: losses, metrics, rewards, upcycling strategies."""

import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("trl")

from hf_moe.model.balancing import routed, statistics
from tests.plugins.conftest import FOLDER
from tests.training.policies import questions, save_model

PLUGIN = FOLDER / "everything.py"
CHATS = [
    {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": f"the dog {i}"}]}
    for i in range(8)
]


def in_a_process(*words) -> subprocess.CompletedProcess:
    """`hf-moe` where nothing has been registered before, and nothing stays."""
    return subprocess.run([sys.executable, "-m", "hf_moe_cli", *map(str, words)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("everything") / "model")


def history(folder) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_a_loss_and_a_metric(model, tmp_path):
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, CHATS)))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"plugins: [{PLUGIN}]\nloss_coefs: {{variance_loss_coef: 0.5}}\nrouter_aux_loss_coef: 0.0\n")
    words = ["--stage", "sft", "--model_name_or_path", model, "--train_data", tmp_path / "chats.jsonl"]
    words += ["--max_steps", 1, "--logging_steps", 1, "--save_strategy", "no", "--use_cpu", "true", "--bf16", "false"]
    words += ["--chat_template_path", "plain", "--report_to", "none", "--router_z_loss_coef", 0.0]
    words += ["--seq_aux_loss_coef", 0.0, "--per_device_train_batch_size", 8]
    found = {}
    for name, further in {"with": [], "without": ["--loss_coefs", '{"variance_loss_coef": 0.0}']}.items():
        result = in_a_process("train", recipe, *words, *further, "--output_dir", tmp_path / name)
        assert result.returncode == 0, result.stderr[-2000:]
        found[name] = history(tmp_path / name)[0]
    assert found["with"]["variance_loss"] > 0 and "variance_loss" not in found["without"]
    assert found["with"]["loss"] - found["without"]["loss"] == pytest.approx(
        0.5 * found["with"]["variance_loss"], rel=1e-3
    )
    assert 0 <= found["with"]["router_load_min"] <= 1
    result = in_a_process(
        "train", recipe, *words, "--loss_coefs", '{"other": 1.0}', "--output_dir", tmp_path / "other"
    )
    assert result.returncode == 2 and "loss_coefs holds other, which is no loss that a plugin" in result.stderr


def test_a_reward_named_in_a_recipe(model, tmp_path):
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions(8))))
    words = ["--model_name_or_path", model, "--train_data", tmp_path / "questions.jsonl", "--max_steps", 1]
    words += [
        "--logging_steps",
        1,
        "--save_strategy",
        "no",
        "--output_dir",
        tmp_path / "out",
        "--reward_funcs",
        "short",
    ]
    result = in_a_process("train", "tiny/grpo", *words, "--plugins", PLUGIN)
    assert result.returncode == 0, result.stderr[-2000:]
    logged = next(entry for entry in history(tmp_path / "out") if "reward" in entry)
    assert logged["reward"] < 0 and "rewards/short/mean" in logged
    result = in_a_process("train", "tiny/grpo", *words)
    assert result.returncode == 2 and "short" in result.stderr


def test_an_upcycling_strategy(tmp_path):
    from hf_moe.demo import DEMO_MODEL

    words = ["upcycle", DEMO_MODEL, tmp_path / "moe", "--experts", 3, "--top-k", 2, "--strategy", "again"]
    result = in_a_process(*words, "--plugin", PLUGIN)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["provenance"]["strategy"] == "again"
    result = in_a_process(*words[:2], tmp_path / "other", *words[3:])
    assert result.returncode == 2 and "again" in result.stderr


def test_the_loss_is_what_its_docstring_says():
    torch.manual_seed(0)
    logits, mask = torch.randn(6, 4), torch.tensor([1, 1, 0, 1, 1, 1])
    scores = logits.softmax(-1)
    batch = routed(logits, scores, scores.topk(2).indices, mask)
    namespace: dict = {}
    text = PLUGIN.read_text()
    exec(text[text.index("def variance_loss") : text.index("def least_load")], namespace)
    mean = sum(scores[t] for t in range(6) if mask[t]) / 5
    slow = sum((x - 0.25) ** 2 for x in mean.tolist()) / 4 * 16
    assert namespace["variance_loss"](batch, statistics(batch), None).item() == pytest.approx(slow, rel=1e-5)
