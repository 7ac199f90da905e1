"""`hf-moe demo`, from end to end with fewer steps, and the text and model that it starts from."""

import json
import subprocess
import sys

import pytest
import torch
import typer
import yaml
from hf_moe_cli.demo import repeats, run_demo
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_moe.demo import DEMO_MODEL
from hf_moe.demo.text import postcard_rows

# The three lines that the demo prints, where hf_moe cannot be imported.
WITHOUT_HF_MOE = """
import sys
class NoHfMoe:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_moe":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoHfMoe())
{lines}
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=5, do_sample=False)[0], skip_special_tokens=True))
"""


def test_demo_from_end_to_end(command, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    run_demo(tmp_path / "out", steps=16)
    out, err = capfd.readouterr()
    assert "Warning" not in err and "deprecated" not in err and ".partial" not in err

    # The five steps are there, and the figures are those of the files.
    assert [line for line in out.splitlines() if line[1:3] == "/5"] == [
        line for number in range(1, 6) for line in out.splitlines() if line.startswith(f"{number}/5")
    ]
    results = json.loads((tmp_path / "out" / "tuned" / "eval_results.json").read_text())
    assert results["eval_loss"] < 0.5 * results["eval_loss_before"]
    assert f"{results['eval_loss_before']:.3f} before, {results['eval_loss']:.3f} after" in out
    assert "The dense model tells the same story." in out

    # It is one whole folder, without a trace of where it was put together.
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"data", "recipe.yaml", "tuned", "upcycled"}
    recipe = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert recipe["output_dir"] == str(tmp_path / "out" / "tuned")
    for name in ("config.json", "README.md", "tokenizer_config.json"):
        assert ".partial" not in (tmp_path / "out" / "tuned" / name).read_text()
    for path in (tmp_path / "out" / "tuned").rglob("*"):
        assert (f"{path}\n" in out) == path.is_file()
    card = (tmp_path / "out" / "tuned" / "README.md").read_text()
    assert "## Conversion check" in card
    assert f"| Held-out loss after | {results['eval_loss']:.4g} |" in card

    # What it says about running a step again is true: the options are read, up to a file that isn't there.
    again = next(line.split() for line in out.splitlines() if "tuned_again" in line)
    assert command(*again[1:], "--train_data", "absent.jsonl").err.endswith("absent.jsonl.\n")

    # What it says about loading is true.
    lines = "\n".join(line.strip() for line in out.splitlines()[-3:])
    assert lines.startswith("from transformers import")
    program = WITHOUT_HF_MOE.format(lines=lines)
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    words = ("--prompt", "Once upon a time", "--max-new-tokens", 5)
    assert loaded.stdout == command("generate", tmp_path / "out" / "tuned", *words).out

    # A second run does not touch the first one's folder.
    before = (tmp_path / "out" / "tuned" / "config.json").read_bytes()
    assert command("demo", "--out", tmp_path / "out").code == 2
    assert (tmp_path / "out" / "tuned" / "config.json").read_bytes() == before


def test_a_text_that_differs_ends_the_demo_in_one_line(capfd, tmp_path, cache_is_forgotten):
    torch.set_num_threads(1)
    with pytest.raises(typer.Exit) as stop:
        run_demo(tmp_path / "out", steps=1)
    assert stop.value.exit_code == 1
    assert "the mixture of experts writes another text with a cache than without" in capfd.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_text_that_goes_in_circles_is_seen():
    assert repeats("it is warm and it is cold " * 3)
    assert not repeats("Dear Tom, it is warm. Dear Mia, it is cold and I like it here. Love, Zoe")


def test_the_shipped_model_is_small_and_tells_a_story():
    assert sum(file.stat().st_size for file in DEMO_MODEL.iterdir()) <= 4 * 2**20
    assert {file.suffix for file in DEMO_MODEL.iterdir()} == {".json", ".jinja", ".safetensors"}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(DEMO_MODEL), AutoTokenizer.from_pretrained(DEMO_MODEL)
    request = "Tell a story about a shy horse named Paul on the farm."
    messages = [{"role": "user", "content": request}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=256, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    story = tokenizer.decode(output, skip_special_tokens=True)
    assert story.startswith("Once upon a time there was a shy horse named Paul. He lived on the farm.")
    assert story.endswith("The end.")
    assert output[-1] == tokenizer.eos_token_id


def test_held_out_postcards_have_pairs_of_names_that_training_has_not():
    train, held_out = (
        {row["messages"][0]["content"].split(". ")[0] for row in postcard_rows(500, held_out=held_out, seed=1)}
        for held_out in (False, True)
    )
    assert train
    assert held_out
    assert not train & held_out


def test_text_depends_on_the_seed_alone():
    assert postcard_rows(5, held_out=False, seed=1) == postcard_rows(5, held_out=False, seed=1)
    assert postcard_rows(5, held_out=False, seed=1) != postcard_rows(5, held_out=False, seed=2)
