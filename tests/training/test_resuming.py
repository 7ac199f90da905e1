"""A resumed run that is told otherwise than its checkpoint was: each difference counts and is named, or is refused."""

import json
import shutil

import pytest
from hf_moe.training.main import main, parse
from hf_moe.training.output.resuming import FILE, KEPT, read_arguments
from hf_moe.training.stages.names import STAGES
from transformers import TrainerState

from hf_moe import MoeTrainer, MoeTrainingArguments

from .conftest import tiny_hf_moe, tiny_tokenizer, write_rows

RUN = ["--max_steps=4", "--save_steps=2", "--per_device_train_batch_size=2", "--learning_rate=1e-3"]
LORA = ["--lora_parts=attention", "--lora_r=2"]
ROWS = [
    {"messages": [{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": "red"}]} for n in "abc"
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model and data of this module's own, and a finished run each of all weights and of an adapter."""
    folder = tmp_path_factory.mktemp("resuming")
    tiny_hf_moe().save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name in ("train", "held_out"):
        write_rows(folder / f"{name}.jsonl", ROWS * 3)
    for name, extra in (("full", []), ("lora", LORA)):
        main([*command(folder, folder / name), *extra])
    return folder


def command(folder, output, *extra):
    return [
        "tiny/sft",
        *(f"--model_name_or_path={folder / 'model'}", f"--train_data={folder / 'train.jsonl'}"),
        *(f"--eval_data={folder / 'held_out.jsonl'}", f"--output_dir={output}", *RUN, *extra),
    ]


def resumed(places, output, *extra, run="full"):
    return main(command(places, output, f"--resume_from_checkpoint={places / run / 'checkpoint-2'}", *extra))


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (["--learning_rate=0.5"], r"learning_rate 0.001 \(now 0.5\)"),
        (["--lr_scheduler_type=cosine"], r"lr_scheduler_type linear \(now cosine\)"),
        (["--warmup_steps=0"], r"warmup_steps 0.1 \(now 0\)"),
        (["--weight_decay=0.1", "--adam_beta2=0.9"], r"weight_decay 0 \(now 0.1\), adam_beta2 0.999 \(now 0.9\)"),
        (["--optim=sgd"], r"optim adamw_torch_fused \(now sgd\)"),
        (["--seed=3"], r"seed 0 \(now 3\)"),
        (["--per_device_train_batch_size=4"], r"rows a step 2 \(now 4; per_device"),
        (["--gradient_accumulation_steps=2"], r"rows a step 2 \(now 4; per_device"),
        (["--trainable=dense_only"], r"trainable all \(now dense_only\)"),
        (["--max_length=64"], r"max_length 256 \(now 64\)"),
        (["--ema_decay=0.9"], r"ema_decay None \(now 0.9\)"),
        (["--train_data={held_out}"], r"train_data of 9 rows, digest \w+ \(now of 8 rows, digest"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_the_state_decides_is_refused_before_a_model_is_loaded(places, tmp_path, monkeypatch, extra, named):
    monkeypatch.setattr("hf_moe.training.stages.sft.load_adapted", None)  # would fail
    other = write_rows(tmp_path / "other.jsonl", ROWS * 2 + ROWS[:2])
    with pytest.raises(ValueError, match=rf"checkpoint-2 is of a run with {named}") as error:
        resumed(places, tmp_path / "out", *(word.format(held_out=other) for word in extra))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_other_contents_under_the_same_name_are_refused(places, tmp_path):
    copy = shutil.copytree(places, tmp_path / "copy")
    resumed(copy, tmp_path / "moved", "--max_steps=3")  # elsewhere, and the same
    changed = [*ROWS * 2, *ROWS[:2], {"messages": [*ROWS[2]["messages"][:1], {"role": "assistant", "content": "blu"}]}]
    write_rows(copy / "train.jsonl", changed)
    with pytest.raises(ValueError, match=r"train_data of 9 rows, digest (\w+) \(now of 9 rows, digest (?!\1)"):
        resumed(copy, tmp_path / "rows")
    tiny_hf_moe(seed=5).save_pretrained(copy / "model")
    with pytest.raises(
        ValueError, match=r"model_name_or_path .*/model \(now .*/copy/model, which holds something else"
    ):
        resumed(copy, tmp_path / "base", *LORA, run="lora")
    with pytest.raises(ValueError, match=r"lora_parts None \(now \['attention'\]\)"):
        resumed(places, tmp_path / "out", *LORA)
    with pytest.raises(ValueError, match=r"lora_r 2 \(now 3\)"):
        resumed(places, tmp_path / "out", *LORA, "--lora_r=3", run="lora")


def test_what_counts_is_named_and_does(places, tmp_path, capsys):
    held_out = write_rows(tmp_path / "other.jsonl", ROWS)
    extra = ["--max_steps=5", "--save_steps=1", "--logging_steps=1", "--max_grad_norm=0.5", f"--eval_data={held_out}"]
    resumed(places, tmp_path / "out", *extra, "--per_device_train_batch_size=1", "--gradient_accumulation_steps=2")
    said = capsys.readouterr().err
    assert "evaluated on eval_data of 9 rows" in said and "those of now count" in said
    (line,) = [line for line in said.splitlines() if "these count" in line]
    for part in (
        "max_steps 5 (was 4)",
        "save_steps 1 (was 2)",
        "logging_steps 1 (was 10)",
        "max_grad_norm 0.5 (was 1",
    ):
        assert part in line
    state = TrainerState.load_from_json(str(tmp_path / "out" / "trainer_state.json"))
    assert [x["step"] for x in state.log_history if "loss" in x] == [3, 4, 5]
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}


def test_pretraining_compares_the_step_that_it_worked_out(places, text_folder, tmp_path):
    def run(*extra):
        given = [f"--model_name_or_path={places / 'model'}", f"--train_data={text_folder / 'train.jsonl'}"]
        given += ["--from_scratch=true", "--max_length=64", "--save_steps=1", f"--output_dir={tmp_path / 'out'}"]
        main(["tiny/pretrain", *given, *extra])

    run("--train_tokens=2000", "--batch_tokens=512")
    with pytest.raises(ValueError, match=r"learning_rate [\d.]+ \(now [\d.]+\)"):
        run("--train_tokens=4000", "--batch_tokens=512", "--resume_from_checkpoint=true")
    with pytest.raises(ValueError, match=r"rows a step 8 \(now 16; "):
        run("--train_tokens=2000", "--batch_tokens=1024", "--resume_from_checkpoint=true")


def test_a_trainer_without_a_recipe_refuses_it_too(tmp_path, capsys):
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 8

    def trainer(**changes):
        args = MoeTrainingArguments(tmp_path, max_steps=2, save_steps=1, use_cpu=True, report_to="none", **changes)
        return MoeTrainer(tiny_hf_moe(), args, train_dataset=rows)

    trainer().train()
    checkpoint = tmp_path / "checkpoint-1"
    with pytest.raises(ValueError, match=r"learning_rate 5e-05 \(now 0.5\)"):
        trainer(learning_rate=0.5).train(resume_from_checkpoint=str(checkpoint))
    trainer(max_grad_norm=0.5).train(resume_from_checkpoint=str(checkpoint))
    assert "these count: max_grad_norm 0.5 (was 1)" in capsys.readouterr().err
    (checkpoint / FILE).unlink()
    trainer(learning_rate=0.5).train(resume_from_checkpoint=str(checkpoint))
    assert "checkpoint-1 has no run.json" in capsys.readouterr().err


def test_what_is_stored_is_json_without_tokens(places):
    said = read_arguments(places / "full" / "checkpoint-2")
    assert said["arguments"]["learning_rate"] == said["step"]["learning_rate"] == 1e-3
    assert "hub_token" not in said["arguments"] and said["rows"]["train_data"]["rows"] == 9
    assert json.loads((places / "full" / FILE).read_text()) == said


def test_every_argument_that_is_kept_is_one_of_a_stage():
    known = set()
    for stage in STAGES:
        given = [f"--{name}=x" for name in ("model_name_or_path", "train_data", "output_dir")]
        known |= parse(["tiny/" + stage, *given])[2].said.keys()
    assert set(KEPT) <= known and len(set(KEPT)) == len(KEPT)
