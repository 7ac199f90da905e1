"""`--plugin FILE`: a router of the user's own is known to every command that is told of it, and to no other."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from hf_moe import HfMoeForCausalLM
from hf_moe.demo import DEMO_MODEL
from hf_moe.model.routing import ROUTERS
from hf_moe.plugins import load_plugin
from tests.plugins.conftest import FOLDER, forgotten  # noqa: F401  (a fixture)


@pytest.fixture
def plugin(tmp_path, forgotten):  # noqa: F811
    return shutil.copy(FOLDER / "my_top_p.py", tmp_path / "my_top_p.py")


@pytest.fixture
def saved(tmp_path, upcycled, plugin):
    """A model with the plugin's router; this process has forgotten it."""
    load_plugin(plugin)
    model = HfMoeForCausalLM.from_pretrained(upcycled)
    model.config.router_type, model.config.router_args = "my_top_p", {"p": 0.6}
    HfMoeForCausalLM(model.config).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((DEMO_MODEL / name).read_bytes())
    assert config["router_type"] == "my_top_p"
    del sys.modules["hf_moe_plugin_my_top_p"], ROUTERS["my_top_p"]
    return tmp_path / "model"


def test_commands_know_what_a_plugin_registers(command, saved, plugin):
    code, _, err = command("inspect", saved)
    assert code == 2 and "my_top_p" in err
    code, out, err = command("inspect", saved, "--json", "--plugin", plugin)
    assert code == 0 and json.loads(out)["total_params"] > 0, err
    code, out, err = command("--plugin", plugin, "generate", saved, "--prompt", "Once", "--max-new-tokens", "3")
    assert code == 0 and out.startswith("Once"), err


def test_a_recipe_names_its_plugins(command, saved, plugin, tmp_path):
    pytest.importorskip("trl")
    rows = [{"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "the dog"}]}] * 4
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["train", "tiny/sft", "--model_name_or_path", saved, "--train_data", tmp_path / "chats.jsonl"]
    words += ["--max_steps", "1", "--save_strategy", "no", "--use_cpu", "true", "--chat_template_path", "plain"]
    code, _, err = command(*words, "--output_dir", tmp_path / "none")
    assert code == 2 and "my_top_p" in err
    code, _, err = command(*words, "--output_dir", tmp_path / "tuned", "--plugin", plugin)
    assert code == 0, err
    assert str(plugin) in (tmp_path / "tuned" / "run.json").read_text()
    tuned = HfMoeForCausalLM.from_pretrained(tmp_path / "tuned")
    assert tuned.config.router_type == "my_top_p"
    assert torch.isfinite(tuned(torch.arange(2, 9)[None]).logits).all()


def test_another_process_knows_nothing_of_it(saved):
    """Nothing is run that the user did not name."""
    run = [sys.executable, "-m", "hf_moe_cli", "inspect", str(saved)]
    result = subprocess.run(run, capture_output=True, text=True)
    assert result.returncode == 2 and "is code that comes with the model, plugin_my_top_p.py" in result.stderr


def test_what_is_wrong_with_a_plugin_is_one_line(command, tmp_path, forgotten):  # noqa: F811
    def said(*words) -> str:
        code, out, err = command(*words)
        assert code == 2 and out == "" and err.count("\n") == 1, err
        return err

    assert "No plugin missing.py: give a Python file." in said("presets", "--plugin", "missing.py")
    assert "No plugin : give" in said("presets", "--plugin")
    faulty = tmp_path / "faulty.py"
    faulty.write_text("a = 1\n\nb = a + '2'\n")
    assert "faulty.py fails in line 3: TypeError: unsupported operand" in said("presets", f"--plugin={faulty}")
    faulty.write_text("a = (\n")
    assert "fails in line 1: SyntaxError" in said("--plugin", faulty, "presets")
    (tmp_path / "other").mkdir()
    for file in (faulty, tmp_path / "other" / "faulty.py"):
        file.write_text("")
    load_plugin(faulty)
    assert load_plugin(faulty).__file__ == str(faulty)
    assert "is loaded: rename one of them" in said("presets", "--plugin", tmp_path / "other" / "faulty.py")
