"""Cut into stages over CPU processes, a run has the losses, gradients, weights and selection biases of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_moe.training import host
from hf_moe.training.host import check_stages
from hf_moe.training.main import main
from hf_moe.training.trainers.pipeline import arguments
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, OlmoeForCausalLM

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from tests.training.conftest import SIZES, tiny_tokenizer
from tests.training.models import BIASED
from tests.training.pipeline_worker import CASES, TIMES, found, run

ROOT = Path(__file__).resolve().parents[2]
RUNS = [
    *("hf_moe:1f1b:2", "hf_moe:interleaved:2", "hf_moe:zbv:2", "hf_moe:dualpipev:2"),
    *("mtp:1f1b:2", "mtp:dualpipev:2", "tied:1f1b:2", "tied:zbv:2", "micro_batch:interleaved:2"),
    *("checkpointed:zbv:2", "selective:dualpipev:2", "quantile:zbv:2", "threshold:interleaved:2"),
    *("mtp_off:zbv:2", "tokens:1f1b:2", "frozen:zbv:2", "frozen:1f1b:2"),
    *("short:dualpipev:2", "short:interleaved:2", "dense:1f1b:2"),
    *("olmoe:1f1b:2", "olmoe:zbv:2", "deepseek_v3:dualpipev:2"),
]
RESUMED = ["hf_moe:zbv:2@hf_moe-1f1b-2", "hf_moe:1f1b:2@hf_moe-1f1b-2"]
FOUR = ["hf_moe:1f1b:4", "rows:interleaved:2"]  # the latter two pipelines


def launched(processes: int, script: str, *words) -> None:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    result = subprocess.run(
        [*launch, str(ROOT / "tests/training" / script), *map(str, words)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,  # processes that wait for each other would never end
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With what two processes found in every run, and four in some."""
    folder = tmp_path_factory.mktemp("pipelines")
    launched(2, "pipeline_worker.py", folder, *RUNS, *RESUMED)
    launched(4, "pipeline_worker.py", folder, *FOUR)
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The same in this process, each case when it is asked for."""
    folder, results = tmp_path_factory.mktemp("one"), {}

    def result(name: str):
        if name not in results:
            trainer, gradient = run(name, "1f1b", 1, folder / name)
            results[name] = found(trainer), gradient, folder / name
        return results[name]

    return result


def assert_close(actual: dict, expected: dict, close: float) -> None:
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert (actual[name] - x).norm() <= close * x.norm(), name


@pytest.mark.parametrize("word", [*RUNS, *FOUR])
def test_run_is_that_of_one_process(folder, one_process, word):
    """All that is logged and the first step's gradient to 1e-5; selection biases, which each process has of all."""
    expected, gradient, single = one_process(word.split(":")[0])
    place = folder / word.replace(":", "-")
    assert_close(load_file(place / "gradient.safetensors"), gradient, 1e-5)
    for result in json.loads((place / "found.json").read_text()):
        assert result["biases"].keys() == expected["biases"].keys()
        for name, bias in expected["biases"].items():
            assert result["biases"][name] == pytest.approx(bias, rel=1e-5, abs=1e-6)
        for entry, other in zip(result["history"], expected["history"], strict=True):
            if word.startswith("rows"):  # held-out rows lie in other batches
                entry, other = ({k: v for k, v in x.items() if not k.startswith("eval")} for x in (entry, other))
            assert entry == pytest.approx(other, rel=1e-5, abs=1e-6)
    weights = (load_file(path / "final" / "model.safetensors") for path in (place, single))
    assert_close(*weights, 1e-4)


@pytest.mark.parametrize("word", RESUMED)
def test_checkpoint_of_a_pipeline_goes_on_in_any(folder, one_process, word):
    """Bit for bit in one like it, and to rounding in another, as in one process, whose checkpoint it might be."""
    unbroken = load_file(folder / "hf_moe-1f1b-2" / "final" / "model.safetensors")
    place = folder / (word.partition("@")[0].replace(":", "-") + "-resumed")
    resumed = load_file(place / "final" / "model.safetensors")
    if "1f1b:2@" in word:
        assert all(torch.equal(resumed[name], x) for name, x in unbroken.items())
    else:
        assert_close(resumed, unbroken, 1e-5)


def test_checkpoints_go_from_many_processes_to_one_and_are_alike(folder, one_process, tmp_path):
    _, _, single = one_process("hf_moe")
    run("hf_moe", "1f1b", 1, tmp_path, resume=str(folder / "hf_moe-zbv-2" / "checkpoint-1"))
    unbroken = load_file(single / "final" / "model.safetensors")
    assert_close(load_file(tmp_path / "final" / "model.safetensors"), unbroken, 1e-4)
    states = [
        torch.load(path / "checkpoint-1" / "optimizer.pt", weights_only=True)
        for path in (folder / "hf_moe-zbv-2", single)
    ]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    for number, state in states[1]["state"].items():
        assert_close(states[0]["state"][number], state, 1e-4)


def test_saved_folder_is_an_ordinary_one(folder):
    for word, tied in (("mtp-dualpipev-2", False), ("tied-1f1b-2", True), ("olmoe-1f1b-2", False)):
        saved = AutoModelForCausalLM.from_pretrained(folder / word / "final")
        weights = load_file(folder / word / "final" / "model.safetensors")
        assert ("lm_head.weight" in weights) != tied
        assert isinstance(saved, OlmoeForCausalLM) == word.startswith("olmoe")


# ---- whole recipes ----

# Not Adam, which makes a whole step of the rounding of a gradient that is 0.
STEPS = [
    "--optim=sgd",
    "--logging_steps=1",
    "--router_bias_update_speed=0.01",
    "--save_strategy=no",
    "--warmup_steps=0",
]
TEXTS = ["--train_tokens=4096", "--batch_tokens=1024", "--max_length=64", "--per_device_train_batch_size=2"]
CHATS = ["--max_steps=3", "--gradient_accumulation_steps=4", "--per_device_train_batch_size=2", "--max_length=128"]
# Recipe -> what it is told, and the schedule.
RECIPES = {
    "tiny/pretrain": ([*TEXTS, "--from_scratch=true", "--learning_rate=1e-3", "--ema_decay=null"], "zbv"),
    "tiny/continue": (TEXTS, "interleaved"),
    "tiny/sft": (CHATS, "1f1b"),
}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory, text_folder, data_folder):
    """Folder and commands of each recipe, run by two processes."""
    folder = tmp_path_factory.mktemp("recipes")
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 4, "initializer_range": 0.3, "num_mtp_layers": 1, "mtp_loss_coef": 0.3}
    HfMoeForCausalLM(HfMoeConfig(**sizes, **BIASED)).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")

    def command(recipe: str, output: str) -> list[str]:
        rows = data_folder if recipe == "tiny/sft" else text_folder
        places = {"model_name_or_path": folder / "model", "output_dir": folder / output / Path(recipe).name}
        places |= {"train_data": rows / "train.jsonl", "eval_data": rows / "val.jsonl"}
        return [recipe, *(f"--{name}={place}" for name, place in places.items()), *STEPS, *RECIPES[recipe][0]]

    over_two = [
        [*command(recipe, "two"), "--pipeline_parallel_size=2", f"--pipeline_schedule={schedule}"]
        for recipe, (_, schedule) in RECIPES.items()
    ]
    (folder / "commands.json").write_text(json.dumps(over_two))
    launched(2, "pipeline_stage_worker.py", folder / "commands.json")
    return folder, command


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_over_two_processes_is_that_of_one(recipes, recipe):
    """The losses before, while and after it trains, all metrics, and the weights."""
    folder, command = recipes
    main(command(recipe, "one"))
    histories = []
    for output in ("two", "one"):
        state = json.loads((folder / output / Path(recipe).name / "trainer_state.json").read_text())
        histories.append([{k: x for k, x in entry.items() if not k.endswith(TIMES)} for entry in state["log_history"]])
    assert any("eval_loss" in entry for entry in histories[0]) and any("mtp_loss" in entry for entry in histories[0])
    for entry, other in zip(*histories, strict=True):
        assert entry == pytest.approx(other, rel=1e-5, abs=1e-6)
    weights = (load_file(folder / x / Path(recipe).name / "model.safetensors") for x in ("two", "one"))
    assert_close(*weights, 1e-4)


# ---- what is refused, before a model is loaded ----


@pytest.fixture
def command(model_folder, text_folder, tmp_path, monkeypatch):
    """The arguments of a run that would be one of two processes."""
    monkeypatch.setattr("transformers.TrainingArguments.world_size", property(lambda args: 2))
    for stage in ("pretrain", "sft"):
        module = f"hf_moe.training.stages.{stage}"
        for name in ("load_trained_model", "new_model", "load_adapted"):
            monkeypatch.setattr(f"{module}.{name}", lambda *_, **__: pytest.fail("loaded"), raising=False)

    def arguments_of(*extra, recipe="tiny/pretrain"):
        places = {"--model_name_or_path": model_folder, "--output_dir": tmp_path / "out"}
        if recipe == "tiny/pretrain":
            places["--train_data"] = text_folder / "train.jsonl"
            extra = ["--from_scratch=false", "--learning_rate=1e-3", "--train_tokens=4000", "--max_length=64", *extra]
        return [recipe, *(str(word) for pair in places.items() for word in pair), "--ema_decay=null", *extra]

    return arguments_of


TWO = "--pipeline_parallel_size=2"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--pipeline_parallel_size=3"], "pipeline_parallel_size is 3, which does not divide the 2 processes"),
        (["--pipeline_parallel_size=0"], "pipeline_parallel_size is 0, which does not divide"),
        ([TWO, "--ema_decay=0.9"], "ema_decay is 0.9, and pipeline_parallel_size 2, which go not together"),
        ([TWO, "--expert_parallel_size=2"], "expert_parallel_size is 2, and pipeline_parallel_size 2"),
        ([TWO, "--optim=muon"], "muon is True, and pipeline_parallel_size 2"),
        ([TWO, "--batch_tokens=128"], "1f1b, which needs one for each process, and a step has 1 micro-batches for 2"),
        (
            [TWO, "--batch_tokens=768", "--pipeline_schedule=dualpipev"],
            "dualpipev, which needs two for each process, and a step has 3 micro-batches for 2 processes: give "
            "another --batch_tokens, or another schedule",
        ),
        (
            [TWO, "--batch_tokens=1792", "--pipeline_schedule=interleaved"],
            "interleaved, which needs a multiple of the number of processes, and a step has 7 micro-batches",
        ),
        ([TWO, "--batch_tokens=1024"], r"The 3 layers do not divide into 2 stages .pipeline_parallel_size 2, 1f1b."),
    ],
    ids=lambda value: str(value)[-45:],
)
def test_what_a_pipeline_cannot_be_is_said_before_the_model_is_loaded(command, extra, message):
    with pytest.raises(ValueError, match=message) as error:
        main(command("--per_device_train_batch_size=4", *extra))
    assert "\n" not in str(error.value)


def test_shards_and_adapters_are_refused(monkeypatch):
    args, two = type("Args", (), {"world_size": 4})(), arguments.PipelineArguments(pipeline_parallel_size=2)
    arguments.check_pipeline(two, args)
    with pytest.raises(ValueError, match=r"lora_parts is \['attention'\], and pipeline_parallel_size 2"):
        arguments.check_pipeline(two, args, type("Adapter", (), {"lora_parts": ["attention"]})())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="pipeline_parallel_size is 2, and a launch file shards the weights, too"):
        arguments.check_pipeline(two, args)


@pytest.mark.parametrize("recipe", ["tiny/dpo", "tiny/distil"])
def test_other_stages_have_no_pipeline(command, recipe):
    with pytest.raises(ValueError, match="pipeline_parallel_size"):
        main(command(TWO, recipe=recipe))


def test_every_case_is_run():
    assert {word.split(":")[0] for word in [*RUNS, *FOUR]} == CASES.keys()


def test_a_pytorch_whose_stages_are_others_is_refused(monkeypatch):
    """Its buffers would have one shape, and no override would say otherwise."""
    check_stages()
    monkeypatch.setattr(host, "OF_STAGES", (*host.OF_STAGES, "_of_no_release"))
    with pytest.raises(ImportError, match=r"PipelineStage\._of_no_release, which PyTorch .* lacks: install torch"):
        check_stages()
