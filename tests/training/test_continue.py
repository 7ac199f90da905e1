"""Continued pretraining: a rate that trained weights bear, dense models too, and a stop where the rate wrecks them."""

import random

import pytest
from hf_moe.conversion import upcycle
from hf_moe.training.main import main
from hf_moe.training.recipes.files import read_recipe, shipped_recipes
from transformers import TrainerState

from hf_moe.demo import DEMO_MODEL
from hf_moe.demo.text import story

from .conftest import write_rows

SHORT = ["--train_tokens=12000", "--batch_tokens=512", "--warmup_steps=1", "--max_length=64", "--save_strategy=no"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stories such as the demo's model was trained on, and that model upcycled."""
    folder = tmp_path_factory.mktemp("continue")
    texts = [{"text": story(random.Random(seed))[1]} for seed in range(200)]
    write_rows(folder / "train.jsonl", texts[20:])
    write_rows(folder / "held_out.jsonl", texts[:20])
    upcycle(DEMO_MODEL, folder / "moe", experts=4, top_k=2, verify=False, progress=False)
    return folder


def run(folder, output, *extra, model=DEMO_MODEL, recipe="tiny/continue"):
    data = [f"--train_data={folder / 'train.jsonl'}", f"--eval_data={folder / 'held_out.jsonl'}"]
    return main([recipe, f"--model_name_or_path={model}", *data, f"--output_dir={output}", *SHORT, *extra])


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_either_kind_of_model_goes_on(folder, kind, tmp_path, capsys):
    metrics = run(folder, tmp_path, model=DEMO_MODEL if kind == "dense" else folder / "moe")
    assert metrics["eval_loss"] < metrics["eval_loss_before"] + 0.05
    left_out = "is dense: the recipe's router_aux_loss_coef, router_z_loss_coef left out" in capsys.readouterr().err
    assert left_out == (kind == "dense")
    history = TrainerState.load_from_json(str(tmp_path / "trainer_state.json")).log_history
    assert [entry["step"] for entry in history if "eval_loss" in entry] == [0, 1, 2, 24]


def test_what_the_command_says_of_experts_is_not_left_out(folder, tmp_path):
    with pytest.raises(ValueError, match=r"router_aux_loss_coef.* 0.3 but LlamaForCausalLM is not a Mixture"):
        run(folder, tmp_path / "out", "--router_aux_loss_coef=0.3")


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_rate_that_wrecks_the_weights_stops_the_run(folder, kind, tmp_path):
    with pytest.raises(ValueError, match=r"eval_loss rose from [\d.]+ to [\d.]+ in the first [12] of 24 steps: learn"):
        run(folder, tmp_path / "out", "--learning_rate=0.1", model=DEMO_MODEL if kind == "dense" else folder / "moe")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_the_laws_rate_is_for_random_weights(folder, tmp_path):
    with pytest.raises(ValueError, match="learning_rate null means the scaling law's, which is for random weights"):
        run(folder, tmp_path / "out", "--from_scratch=false", recipe="tiny/pretrain")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in shipped_recipes() if name.endswith("/continue")])
def test_a_recipe_that_goes_on_says_its_rate_and_warms_up(name):
    recipe = read_recipe(name)
    assert 0 < recipe["learning_rate"] <= 1e-3 and recipe["warmup_steps"] > 0 and not recipe.get("from_scratch")
