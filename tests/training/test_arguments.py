import math

import pytest
import yaml
from hf_moe.training.main import check_recipe, parse
from hf_moe.training.recipes.files import read_recipe, shipped_recipes
from hf_moe.training.recipes.parser import REQUIRED
from hf_moe.training.stages.names import STAGES

from tests.recipes import recipes

GIVEN = ["--model_name_or_path", "model", "--train_data", "rows.jsonl", "--output_dir", "out"]
CPU = ["--bf16", "false"]
STEPS = ("logging_steps", "eval_steps", "save_steps", "warmup_steps")


@pytest.mark.parametrize("name", recipes())
def test_every_argument_of_a_shipped_recipe_arrives(name):
    arguments = {}
    for part in parse([name, *GIVEN, *CPU]):
        arguments |= vars(part)
    recipe = read_recipe(name)
    assert len(recipe) > 20
    for key, value in recipe.items():
        if key not in (*REQUIRED, "bf16"):
            assert arguments[key] == ([] if value == "none" else value), key  # report_to: none


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipe_names_no_path_and_has_a_readme(name):
    assert all(read_recipe(name)[key] is None for key in REQUIRED)
    assert f"hf-moe train {name}" in shipped_recipes()[name].with_name("README.md").read_text(encoding="utf-8")


@pytest.fixture
def recipe(tmp_path):
    def write(**arguments):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({"use_cpu": True, "bf16": False, "max_steps": 3} | arguments), encoding="utf-8")
        return str(path)

    return write


def test_command_line_wins_over_recipe_and_recipe_over_default(recipe):
    name = recipe(learning_rate=0.5, seed=7, train_data=["a.jsonl", "b.jsonl"], model_init_kwargs={"x": 1})
    model, data, training, *_ = parse([name, "--seed", "9", "--model_name_or_path=model", "--output-dir", "out"])
    assert (training.seed, training.learning_rate, training.max_steps) == (9, 0.5, 3)
    assert (model.model_name_or_path, training.output_dir) == ("model", "out")
    assert data.train_data == ["a.jsonl", "b.jsonl"]
    assert training.model_init_kwargs == {"x": 1}


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("stage", ["sft", "pretrain", "distil", "dpo", "grpo"])
@pytest.mark.parametrize(
    ("said", "extra", "expected"),
    [
        ({}, [], (True, None)),  # TRL's default
        ({"gradient_checkpointing": False}, [], (False, None)),
        ({"activation_checkpointing": False}, [], (False, None)),
        ({"activation_checkpointing": True}, ["--gradient_checkpointing", "false"], (False, None)),
        ({"activation_checkpointing": True}, ["--no-gradient-checkpointing"], (False, None)),
        ({"gradient_checkpointing": False}, ["--activation-checkpointing=true"], (True, None)),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": False}}, [], (True, {"use_reentrant": False})),
        ({}, ["--activation_checkpointing_kwargs", '{"use_reentrant": false}'], (True, {"use_reentrant": False})),
        ({"activation_checkpointing": "selective"}, [], ("selective", None)),
        ({"activation_checkpointing": True}, ["--gradient_checkpointing", "selective"], ("selective", None)),
        ({"activation_checkpointing": "selective"}, ["--activation_checkpointing", "no"], (False, None)),
    ],
    ids=[
        *("neither", "old", "new", "old-over-new", "no-old", "new-over-old", "kwargs", "kwargs-in-json"),
        *("selective", "selective-over-true", "no-over-selective"),
    ],
)
def test_either_name_of_checkpointing_is_known_and_the_later_wins(recipe, stage, said, extra, expected):
    """Transformers 5.23 gave it another name; recipes and commands may have either, on each host, and none warns."""
    args = parse([recipe(stage=stage, **said), *GIVEN, *extra])[2]
    assert (args.activation_checkpointing, args.activation_checkpointing_kwargs) == expected
    assert (args.gradient_checkpointing, args.gradient_checkpointing_kwargs) == expected


def test_both_names_in_one_recipe_are_an_error(recipe):
    name = recipe(activation_checkpointing=True, gradient_checkpointing=False)
    with pytest.raises(ValueError, match="gradient_checkpointing is the old name of activation_checkpointing, which"):
        parse([name, *GIVEN])


def values(words: list[str]) -> dict:
    return {name: value for part in parse(words) for name, value in vars(part).items()}


@pytest.mark.parametrize("stage", STAGES)
def test_every_value_of_a_recipe_can_be_unset(stage, recipe):
    """What may be none is none; anything else is what it is without a word."""
    said = {"chat_template_path": "plain", "eval_data": ["a"], "seed": 3, "trainable": "router_only"}
    said |= {"max_length": 9, "lr_scheduler_type": "linear", "gradient_checkpointing": True, "save_strategy": "no"}
    bare = values([recipe(stage=stage), *GIVEN])
    said = {key: value for key, value in said.items() if key in bare}
    name = recipe(stage=stage, **said)
    expected = {key: None if key == "max_length" else bare[key] for key in said}
    for words in ([f"--{key}", "null"] for key in said), ([f"--{key.replace('_', '-')}=null"] for key in said):
        found = values([name, *GIVEN, *(word for pair in words for word in pair)])
        assert {key: found[key] for key in said} == expected
    found = values([recipe(stage=stage, **dict.fromkeys(said)), *GIVEN])
    assert {key: found[key] for key in said} == expected
    assert values([recipe(stage=stage), *GIVEN, "--seed", "null", "--seed", "5"])["seed"] == 5


def test_null_unsets_what_the_recipe_says(recipe):
    name = recipe(
        chat_template_path="plain", max_steps=7, train_data=["null", "a"], eval_data=["b"], learning_rate=None
    )
    found = values([name, *GIVEN[:2], *GIVEN[4:], "--chat_template_path", "null", "--eval_data", "null"])
    assert (found["chat_template_path"], found["eval_data"], found["max_steps"]) == (None, None, 7)
    assert (
        found["train_data"] == ["null", "a"] and found["learning_rate"] == values([recipe(), *GIVEN])["learning_rate"]
    )
    assert values([name, *GIVEN, "--max_steps", "null"])["max_steps"] == -1
    with pytest.raises(
        ValueError, match="unknown argument chat_template; the nearest known one is chat_template_path"
    ):
        parse([name, *GIVEN, "--chat_template", "null"])
    with pytest.raises(ValueError, match="leaves --output_dir to you"):
        parse([name, *GIVEN, "--output_dir", "null"])


def test_null_in_a_recipe_is_a_value(recipe):
    assert parse([recipe(), *GIVEN])[2].max_length == 1024
    assert parse([recipe(max_length=None), *GIVEN])[2].max_length is None


@pytest.mark.parametrize(
    ("arguments", "extra", "message"),
    [
        ({"learning_rat": 1}, [], "unknown argument learning_rat; the nearest known one is learning_rate"),
        ({}, ["--max_step", "3"], "unknown argument max_step; the nearest known one is max_steps"),
        ({}, ["--eval-dat=x"], "unknown argument eval_dat; the nearest known one is eval_data"),
        ({"stage": "sfft"}, [], "stage is 'sfft'; it can be sft"),
        ({"stage": ["sft"]}, [], r"stage is \['sft'\]; it can be sft"),
        ({"stage": "sft"}, ["--stage", "x"], "stage is 'x'; it can be sft"),
        ({}, ["--lora_rank", "3"], "unknown argument lora_rank; the nearest known"),
        ({}, ["--seed", "3", "4"], "'4' belongs to no argument"),
        ({"max_steps": "many"}, [], "max_steps.*invalid int value: 'many'"),
        ({"max_steps": 1.5}, [], "max_steps.*invalid int value: '1.5'"),
        ({"loss_type": "mse"}, [], "loss_type.*invalid choice: 'mse'"),
        ({}, ["--seed"], "seed.*expected one argument"),
        ({"dtype": "float8"}, [], "dtype.*invalid choice: 'float8'"),
        ({}, ["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps is 0; it must be at least 1"),
        ({"stage": "pretrain", "max_length": 0}, [], "max_length is 0; it must be at least 2"),
        ({"label_smoothing_factor": 1.1}, [], "label_smoothing_factor is 1.1; it must be from 0 to 1"),
        ({"stage": "dpo", "beta": -0.1}, [], "beta is -0.1; it must be at least 0"),
        ({"weight_decay": -0.1}, [], "weight_decay is -0.1; it must be at least 0"),
        ({}, ["--eval_accumulation_steps", "0"], "eval_accumulation_steps is 0; it must be at least 1"),
        ({}, ["--neftune_noise_alpha", "-1"], "neftune_noise_alpha is -1.0; it must be from 0 to 10000"),
        ({}, ["--neftune_noise_alpha", "1e39"], r"neftune_noise_alpha is 1e\+39; it must be from 0 to 10000"),
        ({"num_train_epochs": -1}, [], "num_train_epochs is -1.0; it must be from 0 to 1000000000"),
        *(({name: math.inf}, [], f"{name} is inf; it must be a finite number") for name in STEPS),
        *(({}, [f"--{name}=nan"], f"{name} is nan; it must be a finite number") for name in STEPS),
        ({"learning_rate": math.inf}, [], "learning_rate is inf; it must be a finite number"),
        ({"max_grad_norm": -math.inf}, [], "max_grad_norm is -inf; it must be a finite number"),
        ({"lr_milestones": [0.5, math.nan]}, [], "lr_milestones is nan; it must be a finite number"),
        ({}, ["--lora_alpha", "0"], "lora_alpha is 0; it must be at least 1"),
        ({}, ["--lr_scheduler_kwargs", "min_lr=0"], "lr_scheduler_kwargs is min_lr=0; it must be a mapping"),
        ({"report_to": "clearml"}, [], "report_to is clearml, whose package is not installed: pip install clearml"),
        ({"report_to": "nonsense"}, [], "report_to is nonsense, which Transformers does not know: say trackio"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_mistake_in_an_argument_is_one_line(recipe, arguments, extra, message):
    with pytest.raises(ValueError, match=message) as error:
        parse([recipe(**arguments), *GIVEN, *extra])
    assert "\n" not in str(error.value)


def test_gradients_need_no_limit(recipe):
    _, _, args, *_ = parse([recipe(max_grad_norm=math.inf), *GIVEN])
    assert args.max_grad_norm == math.inf


def test_missing_arguments_are_all_named(recipe):
    with pytest.raises(ValueError, match="leaves --model_name_or_path and --train_data and --output_dir to you"):
        parse([recipe()])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "holds a list"),
        ("", "holds a NoneType"),
        ("a: [1\nb: 2\n", "is not YAML"),
        ("\0", "is not YAML"),
    ],
)
def test_file_that_is_no_recipe(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        parse([str(path), *GIVEN])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["absent.yaml", "tiny/absent", "../recipes/tiny/sft", "tiny"])
def test_unknown_recipe_names_the_nearest_ones(name):
    with pytest.raises(FileNotFoundError, match=rf"No recipe {name}: .* hf-moe train --list .* tiny/\w+"):
        parse([name, *GIVEN])


def test_no_recipe_at_all():
    with pytest.raises(ValueError, match="Give a recipe"):
        parse([])


@pytest.mark.parametrize("name", recipes())
def test_every_shipped_recipe_is_valid_and_says_what_it_does(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_recipe(name) == len(read_recipe(name))
    assert list(tmp_path.iterdir()) == []
    first = shipped_recipes()[name].read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ") and first.endswith(".")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trainabel": "all"}, "unknown argument trainabel; the nearest known one is trainable."),
        ({"trainable": "dense"}, r"argument trainable: invalid choice: 'dense'"),
        ({"learning_rate": "high"}, "argument learning_rate: invalid float value: 'high'"),
        ({"max_steps": [3]}, r"argument max_steps cannot be \[3\]: .*int"),
        ({"train_data": ["a.jsonl", 3]}, r"argument train_data cannot be \['a.jsonl', 3\]"),
        ({"model_init_kwargs": ["x"]}, r"argument model_init_kwargs cannot be \['x'\]"),
        ({"lr_scheduler_type": "triangular"}, "triangular"),
        ({"lora_parts": ["attention", "attn"]}, "argument lora_parts cannot hold 'attn'; it can hold attention, "),
        (
            {"stage": "grpo", "reward_funcs": ["praise"]},
            "argument reward_funcs cannot hold 'praise'; it can hold gsm8k",
        ),
        ({"load_best_model_at_end": True, "save_strategy": "no", "eval_strategy": "epoch"}, "load_best_model_at_end"),
        ({"report_to": "clearml"}, "report_to is clearml, whose package is not installed: pip install clearml"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; it must be at least 1"),
        ({"save_steps": math.inf}, "save_steps is inf; it must be a finite number"),
        ({3: "x"}, "unknown argument 3"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_check_names_the_file_and_the_argument(recipe, arguments, message):
    name = recipe(**{"bf16": True, **{key: value for key, value in arguments.items() if isinstance(key, str)}})
    if 3 in arguments:
        with open(name, "a", encoding="utf-8") as file:
            file.write("3: x\n")
    with pytest.raises(ValueError, match=message) as error:
        check_recipe(name)
    assert str(error.value).startswith(f"recipe {name}: ") and "\n" not in str(error.value)


def test_check_does_not_depend_on_the_machine(recipe):
    assert check_recipe(recipe(bf16=True, use_cpu=False, tf32=True, deepspeed="zero3.json")) == 5
    assert check_recipe(recipe(fsdp="full_shard")) == 4
