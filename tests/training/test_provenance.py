"""What a folder says that it was trained from is what the weights were before the first step, for every stage."""

import json

import pytest
import torch
from hf_moe.training.main import main
from hf_moe.training.trainers.trainer import MoeTrainerMixin
from safetensors.torch import load_file
from transformers import AutoConfig

from hf_moe import HfMoeForCausalLM, MoeTrainer, MoeTrainingArguments
from hf_moe.hub import push, write_model_card

from .conftest import tiny_hf_moe, tiny_tokenizer, write_rows
from .policies import pairs, questions

CHECK = {"max_abs_diff": 0.125, "kl": 0.0}
PROVENANCE = {"source": "dense", "method": "upcycle", "revision": None, "sha256": {"model.safetensors": "ab" * 32}}
CARD = "---\nlicense: apache-2.0\nlanguage: [en]\n---\n"
ROWS = {
    "sft": [{"messages": [{"role": "user", "content": "Say red."}, {"role": "assistant", "content": "red"}]}] * 4,
    "pretrain": [{"text": "red green blue " * 9}] * 8,
    "dpo": pairs(4),
    "grpo": questions(4),
}
ROWS["distil"] = ROWS["sft"]
SMALL = ["--max_steps=1", "--per_device_train_batch_size=2", "--save_strategy=no", "--warmup_steps=0"]
STAGE = {
    "pretrain": ["--train_tokens=256", "--batch_tokens=256", "--max_length=64", "--learning_rate=1e-3", *SMALL[1:]],
    "grpo": [*SMALL, "--num_generations=2", "--max_completion_length=4", "--num_iterations=1"],
}
LORA = ["--lora_parts", "attention", "routed_experts", "--lora_merge=float32"]
ESFT = ["--esft_p=0.4", "--esft_batches=1", "--esft_merge=true"]
RUNS = [
    *((stage, ["--trainable=all"]) for stage in ("sft", "distil", "dpo", "grpo")),
    *((stage, LORA) for stage in ("sft", "dpo", "grpo")),
    *((stage, ESFT) for stage in ("sft", "dpo")),
    *(("sft", [f"--trainable={group}"]) for group in ("dense_only", "router_only")),
    ("pretrain", ["--from_scratch=false"]),
    ("pretrain", ["--from_scratch=true"]),
    ("pretrain", ["--from_scratch=true", "--trainable=dense_only"]),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A converted model with a card, as `hf-moe upcycle` leaves it."""
    folder = tmp_path_factory.mktemp("made") / "moe"
    model = tiny_hf_moe(seed=7)  # not the seed of the runs
    model.config.provenance = PROVENANCE | {"check": CHECK}
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


def before_training(monkeypatch) -> dict[str, torch.Tensor]:
    """Filled with the weights that training begins with, by their names in the file."""
    weights, begin = {}, MoeTrainerMixin.begin_routing

    def remember(trainer):
        begin(trainer)
        for name, weight in trainer.moe.state_dict().items():
            name = name.replace("base_layer.", "").replace("parametrizations.", "")
            weights[name.removesuffix(".0.whole")] = weight.detach().clone()

    monkeypatch.setattr(MoeTrainerMixin, "begin_routing", remember)
    return weights


@pytest.mark.parametrize(("stage", "extra"), RUNS, ids=lambda value: value if isinstance(value, str) else value[0])
def test_started_from_is_said_only_where_the_weights_are_the_sources(source, stage, extra, tmp_path, monkeypatch):
    began = before_training(monkeypatch)
    data, out = write_rows(tmp_path / "rows.jsonl", ROWS[stage]), tmp_path / "out"
    given = [f"--model_name_or_path={source}", f"--train_data={data}", f"--output_dir={out}"]
    given += [f"--teacher_model_name_or_path={source}"] if stage == "distil" else []
    main([f"tiny/{stage}", *given, *STAGE.get(stage, SMALL), *extra])
    stored = load_file(source / "model.safetensors")
    same = [torch.equal(began[name], weight) for name, weight in stored.items() if name in began and weight.dim() > 1]
    assert len(same) > 10 and (all(same) or not any(same))

    for folder in (out, *(out / name for name in ("merged", "ema") if (out / name).is_dir())):
        record = json.loads((folder / "training.json").read_text())["stages"]
        assert [("base_model" in x, "source_card" in x) for x in record] == [(all(same), all(same))]
        assert record[0].get("base_model", record[0].get("configuration")) == "moe"
        assert record[0].get("weights") == (None if all(same) else "drawn anew")
        card = write_model_card(folder).read_text()
        assert ("| Started from | moe |" in card) == all(same)
        assert ("license: apache-2.0" in card) == all(same)
        if (folder / "config.json").is_file():
            said = [word in card for word in ("Conversion check", "abab", "upcycle", "made from dense")]
            assert said == [all(same)] * 4
            assert ("random weights, by the configuration of moe" in card) == (not all(same))
            assert push(folder, "me/mine", dry_run=True)["files"]


def test_a_recipe_alone_leaves_no_weights_aside(source, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", ROWS["pretrain"])
    given = [f"--train_data={data}", f"--output_dir={tmp_path / 'out'}", *STAGE["pretrain"]]
    for name in (str(source), "someone/moe"):
        with pytest.raises(
            ValueError, match=rf"model_name_or_path {name} has weights, and the .*--from_scratch false"
        ):
            main(["tiny/pretrain", f"--model_name_or_path={name}", *given])
    assert not (tmp_path / "out").exists()
    for path in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / path).write_bytes((source / path).read_bytes())
    main(["tiny/pretrain", f"--model_name_or_path={tmp_path}", *given])
    assert f"from scratch: weights drawn by the configuration of {tmp_path} and seed 0\n" in capsys.readouterr().err


def test_a_resumed_run_from_scratch_still_says_so(source, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", ROWS["pretrain"])
    given = [f"--train_data={data}", f"--model_name_or_path={source}", "--from_scratch=true", "--save_steps=1"]
    given = ["tiny/pretrain", *given, f"--output_dir={tmp_path / 'out'}", *STAGE["pretrain"], "--save_strategy=steps"]
    main(given)
    record = (tmp_path / "out" / "training.json").read_text()
    (tmp_path / "out" / "training.json").unlink()
    main([*given, "--resume_from_checkpoint=true"])
    assert (tmp_path / "out" / "training.json").read_text() == record and '"configuration": "moe"' in record


@pytest.mark.parametrize("anew", [False, True])
def test_without_a_recipe_the_weights_tell(source, anew, tmp_path, capsys):
    config = AutoConfig.from_pretrained(source)
    model = HfMoeForCausalLM(config) if anew else HfMoeForCausalLM.from_pretrained(source)
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 2
    trainer = MoeTrainer(model, MoeTrainingArguments(tmp_path, max_steps=1, use_cpu=True), train_dataset=rows)
    trainer.save_model()
    record = json.loads((tmp_path / "training.json").read_text())["stages"][0]
    assert record.get("base_model") == (None if anew else "moe")
    card = write_model_card(tmp_path).read_text()
    assert ("made from dense" in card) == (not anew) and ("Conversion check" in card) == (not anew)
    assert ("weights of its own" in capsys.readouterr().err) == anew
