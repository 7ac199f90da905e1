"""The recipes of policies and of 4-bit weights, end to end, on tiny models of their architectures."""

import pytest
import torch
from hf_moe.training.main import main
from hf_moe.training.recipes.files import shipped_recipes
from hf_moe.training.stages.rewards import REWARDS
from hf_moe.training.weights.adapters import LORA_PARTS
from hf_moe.training.weights.groups import GROUPS, part_of
from transformers import AutoModelForCausalLM

from .conftest import write_rows
from .models import hf_moe
from .policies import pairs, questions, save_model
from .test_recipes import ARCHITECTURES, BYTES, SMALL, TRAINED

# Router replay is for hf_moe's routers: what `hf-moe import` makes of Transformers' own models.
IMPORTED = {
    "olmoe-1b-7b": lambda: hf_moe(**BYTES, norm_topk_prob=False),
    "mixtral-8x7b": lambda: hf_moe(**BYTES, router_type="topk_softmax"),
}
CHANGED = {"dpo": GROUPS["all"], "grpo": GROUPS["all"], "qlora": LORA_PARTS}  # qlora: quantised, if not trained
ROWS = {"dpo": pairs(5), "grpo": questions(5)}
ROLES = {"user": "prompt", "assistant": "chosen"}
ROWS["qlora"] = [{"messages": [{"role": x, "content": row[y]} for x, y in ROLES.items()]} for row in ROWS["dpo"]]
ONE = SMALL | {"max_steps": 1, "gradient_accumulation_steps": 1}
GIVEN = {
    "dpo": ONE,
    "grpo": {name: value for name, value in ONE.items() if name != "max_length"}
    | {"num_generations": 2, "steps_per_generation": 1, "max_completion_length": 6, "num_iterations": 1}
    | {"per_device_eval_batch_size": 2, "learning_rate": 1e-3},
    "qlora": ONE | {"dtype": "float32"},
}
NAMES = [name for name in shipped_recipes() if name.split("/")[1] in CHANGED]


def every_other(completions, **columns):
    """A reward that always leaves something to learn."""
    return [float(i % 2) for i in range(len(completions))]


def test_every_recipe_is_run_by_one_test_or_the_other():
    assert {name.split("/")[1] for name in shipped_recipes()} == TRAINED.keys() | CHANGED.keys()


@pytest.mark.parametrize("name", NAMES)
def test_recipe_runs_and_changes_its_parts(name, tmp_path, monkeypatch):
    architecture, kind = name.split("/")
    for reward in ("gsm8k_format", "digit_share"):  # every other text is better, so that there is something to learn
        monkeypatch.setitem(
            REWARDS, reward, lambda completions, **rest: [float(i % 2) for i in range(len(completions))]
        )
    models = ARCHITECTURES | (IMPORTED if kind == "grpo" else {})
    model = models[architecture]()
    places = {"model_name_or_path": save_model(tmp_path / "model", model), "output_dir": tmp_path / "out"}
    places |= {"train_data": write_rows(tmp_path / "rows.jsonl", ROWS[kind])}
    metrics = main([name, *(f"--{key}={value}" for key, value in (GIVEN[kind] | places).items())])
    assert "train_loss" in metrics
    whole = tmp_path / "out" / ("merged" if kind == "qlora" else ".")
    after, before = AutoModelForCausalLM.from_pretrained(whole).state_dict(), model.state_dict()
    assert after.keys() == before.keys()
    changed = {part_of(key) for key, x in after.items() if not torch.equal(x, before[key])}
    assert changed == set(CHANGED[kind]) & {part_of(key) for key in before}
