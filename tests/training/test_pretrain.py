"""`stage: pretrain` from text to model: how the run is sized, what is packed, what is saved, and how it resumes."""

import json

import pytest
import torch
from hf_moe.training.main import main, parse
from hf_moe.training.stages import pretrain
from hf_moe.training.stages.pretrain import size_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_moe import HfMoeConfig
from hf_moe.sizes.counts import sizes

SHORT = ["--train_tokens", "4000", "--batch_tokens", "1024", "--max_length", "128", "--save_steps", "2"]
SHORT += ["--learning_rate", "1e-2", "--logging_steps", "1000", "--warmup_steps", "0"]


@pytest.fixture
def command(model_folder, text_folder, tmp_path):
    def arguments(*extra, output="out", data=text_folder / "train.jsonl"):
        places = {"--model_name_or_path": model_folder, "--train_data": data, "--output_dir": tmp_path / output}
        anew = ["--from_scratch", "true"]
        return ["tiny/pretrain", *(str(word) for pair in places.items() for word in pair), *anew, *extra]

    return arguments


def test_from_scratch_resumed_or_not_ends_bitwise_alike_and_the_average_is_a_model(
    command, model_folder, text_folder, tmp_path, capsys
):
    metrics = main(command(*SHORT, "--eval_data", str(text_folder / "val.jsonl")))
    assert "learning rate 0.01, 1,024 tokens a step, 4 steps" in capsys.readouterr().err
    assert metrics["eval_loss"] < metrics["eval_loss_before"] - 1
    weights, averaged = (load_file(tmp_path / "out" / x / "model.safetensors") for x in (".", "ema"))
    before = load_file(model_folder / "model.safetensors")
    assert abs(before["lm_head.weight"].std() - 0.3) < 0.05  # what from_scratch draws anew, by the same configuration
    assert not torch.equal(before["lm_head.weight"], weights["lm_head.weight"])
    assert averaged.keys() == weights.keys()
    assert not torch.equal(averaged["lm_head.weight"], weights["lm_head.weight"])
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "ema")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not {"weight_average.safetensors", "training_args.bin", ".ema"} & names

    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    main(command(*SHORT, "--resume_from_checkpoint", checkpoint, output="resumed"))
    for name, expected in ((".", weights), ("ema", averaged)):
        found = load_file(tmp_path / "resumed" / name / "model.safetensors")
        assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_rows_are_full_and_no_token_is_lost(command, text_folder, monkeypatch):
    seen = []
    monkeypatch.setattr(pretrain, "train_and_merge", lambda trainer, *_: seen.append(trainer) or {})
    main(command(*SHORT, "--max_length", "40"))
    rows = seen[0].train_dataset
    documents = [json.loads(line)["text"] for line in (text_folder / "train.jsonl").read_text().splitlines()]
    assert sum(map(len, rows["input_ids"])) == sum(
        len(document) + 1 for document in documents
    )  # a byte a token, and </s>
    assert max(map(len, rows["input_ids"])) == 40 and sum(map(len, rows["input_ids"])) > 0.9 * 40 * len(rows)
    batch = seen[0].data_collator([rows[0]])
    starts = (batch["position_ids"] == 0).sum().item()
    assert starts == len(rows[0]["seq_lengths"]) and "attention_mask" not in batch


def test_what_is_null_comes_from_the_laws(command, model_folder):
    _, _, args, _ = parse(command("--train_tokens", "3e6"))
    said = size_run(str(model_folder), args)
    flops = sizes(HfMoeConfig.from_pretrained(model_folder), 128)["non_embedding_training_flops_per_token"]
    compute = flops * 3e6
    assert args.learning_rate == pytest.approx(0.3118 * compute**-0.125)
    step = 4 * 128 * args.gradient_accumulation_steps
    assert abs(step - 0.2920 * compute**0.3271) <= 4 * 128 / 2
    assert args.max_steps == -(-3_000_000 // step)
    assert f"{flops:.3g} FLOPs a token" in said and "learning_rate and batch_tokens" in said


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--gradient_accumulation_steps", "2"], "gradient_accumulation_steps is 2.*batch_tokens decides it"),
        (["--train_tokens=0"], "train_tokens is 0"),
        (["--batch_tokens=-3"], "batch_tokens is -3"),
        (["--train_tokens=inf"], "train_tokens is inf"),
        (["--max_steps=2"], "max_steps is 2, but train_tokens .50,000. decides"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refused_sizes(command, extra, message):
    with pytest.raises(ValueError, match=message) as error:
        main(command(*extra))
    assert "\n" not in str(error.value)


def test_laws_need_to_know_how_much(command, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{stage: pretrain, use_cpu: true, bf16: false, max_steps: 3, max_length: 64}")
    with pytest.raises(ValueError, match=r"learning_rate and batch_tokens null means the scaling law's.*give --train"):
        main([str(recipe), *command()[1:]])


def test_sources_are_mixed_by_weight(command, text_folder, monkeypatch):
    seen = []
    monkeypatch.setattr(pretrain, "train_and_merge", lambda trainer, *_: seen.append(trainer) or {})
    both = [str(text_folder / "train.jsonl"), str(text_folder / "val.jsonl")]
    main(command(*SHORT, "--train_data", *both, "--train_weights", "1", "3"))
    main(command(*SHORT, "--train_data", *both, output="plain"))
    tokens = [sum(map(len, trainer.train_dataset["input_ids"])) for trainer in seen]
    assert tokens[0] > 2 * tokens[1]  # the few rows of the heavier source again and again


def test_rows_that_are_no_text(command, data_folder):
    with pytest.raises(ValueError, match="stage pretrain reads text, but there are rows with the columns messages"):
        main(command(data=data_folder / "train.jsonl"))
