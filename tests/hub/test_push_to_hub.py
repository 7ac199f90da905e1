"""`push_to_hub` of the model class and of the trainers: what arrives is what `hf-moe push` would send."""

import json

import pytest
from hf_moe.training.main import main
from hf_moe.training.output.record import stages, write_record
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, get_peft_model

import hf_moe
from hf_moe.hub import push
from tests.training.conftest import data_folder, datasets_cache, model_folder  # noqa: F401  (fixtures)
from tests.training.models import rows

from .server import TOKEN, Refusal


def test_the_model_class_sends_code_and_card(hub, model, folder):
    commit = model.push_to_hub("by-class", tags=["tiny"])
    push(folder, "tester/by-folder")
    assert hub.repos["tester/by-class"].private and commit.oid == hub.repos["tester/by-class"].branches["main"]
    mine, other = hub.files("tester/by-class"), hub.files("tester/by-folder")
    only = {"model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"}
    assert {name for name in mine.keys() ^ other.keys() if "-of-" not in name} == only
    assert json.loads(mine["config.json"])["auto_map"]["AutoModelForCausalLM"] == "modeling_hf_moe.HfMoeForCausalLM"
    card = ModelCard(mine["README.md"].decode())
    assert "tiny" in card.data.tags and 'from_pretrained("tester/by-class", trust_remote_code=True)' in card.text

    # What its owner has written on the Hub since stays.
    mine = b"---\nlicense: mit\n---\n# Mine\n"
    HfApi().upload_file(path_or_fileobj=mine, path_in_repo="README.md", repo_id="tester/by-class")
    model.push_to_hub("tester/by-class", private=False)
    assert hub.files("tester/by-class")["README.md"].endswith(b"# Mine\n")
    hub.refuse = lambda method, path: Refusal(403, f"Bearer {TOKEN}") if "commit" in path else None
    with pytest.raises(OSError, match=r"403, this token may not write there.*\[token\]"):
        hf_moe.HfMoeForCausalLM(model.config).push_to_hub("tester/by-class")


def test_a_recipe_pushes_each_checkpoint_and_the_end(hub, model_folder, data_folder, tmp_path):  # noqa: F811
    places = {"--model_name_or_path": model_folder, "--train_data": data_folder / "train.jsonl"}
    places |= {"--eval_data": data_folder / "val.jsonl", "--output_dir": tmp_path / "tuned"}
    words = [str(word) for pair in places.items() for word in pair]
    words += ["--max_steps", "3", "--logging_steps", "1", "--save_steps", "2", "--per_device_train_batch_size", "4"]
    main(["tiny/sft", *words, "--push_to_hub", "true", "--save_strategy", "steps", "--hub_always_push", "true"])
    repo = hub.repos["tester/tuned"]
    assert repo.private
    assert repo.messages[0] == "initial commit" and repo.messages[-1] == "End of training"
    assert "Training in progress, step 2" in repo.messages
    first = next(files for files in repo.commits.values() if "config.json" in files)
    for files in ({name: blob.data for name, blob in first.items()}, hub.files("tester/tuned")):
        assert {"modeling_hf_moe.py", "routing.py", "model.safetensors", "tokenizer.json", "README.md"} <= files.keys()
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pth")) or "checkpoint" in name]
        (stage,) = json.loads(files["training.json"])["stages"]
        assert stage == {
            "stage": "sft",
            "seed": stage["seed"],
            "train_data": ["train.jsonl"],
            "eval_data": ["val.jsonl"],
            "base_model": model_folder.name,
            "hf_moe_version": hf_moe.__version__,
        }
        assert str(tmp_path).encode() not in files["README.md"] + files["training.json"]
    card = ModelCard(hub.files("tester/tuned")["README.md"].decode())
    assert card.data.tags == ["hf_moe", "mixture-of-experts", "sft", "trl"]
    (result,) = card.data.eval_results
    measured = json.loads((tmp_path / "tuned" / "eval_results.json").read_text())["eval_loss"]
    assert (result.dataset_name, result.metric_type) == ("val.jsonl", "loss")
    assert result.metric_value == pytest.approx(measured, abs=1e-6)
    assert not list((tmp_path / "tuned").glob(".push*")) and not (tmp_path / "tuned" / "training_args.bin").exists()


def test_what_the_trainer_cannot_push_is_refused_before_training(hub, model, tmp_path):
    def trainer(model=model, **changes):
        args = hf_moe.MoeTrainingArguments(
            tmp_path / "out", use_cpu=True, report_to="none", push_to_hub=True, max_steps=1, **changes
        )
        return hf_moe.MoeTrainer(model, args, train_dataset=rows(4))

    with pytest.raises(ValueError, match="hub_strategy is checkpoint, which would upload pickles"):
        trainer(hub_strategy="checkpoint")
    with pytest.raises(OSError, match="403"):
        trainer(hub_model_id="somebody/model")
    assert trainer(hub_private_repo=False, hub_model_id="tester/open").hub_model_id == "tester/open"
    assert not hub.repos["tester/open"].private
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path)
    with pytest.raises(ValueError, match=f"The adapter's base model is {tmp_path}, a folder of this machine"):
        trainer(adapted)


def test_training_from_a_model_of_the_hub_carries_its_licence_and_its_stages(hub, model, folder, tmp_path):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    (folder / "training.json").write_text(json.dumps({"stages": [{"stage": "pretrain"}]}))
    push(folder, "tester/base")
    model.config._name_or_path, model.config._commit_hash = "tester/base", hub.repos["tester/base"].branches["main"]
    first, second = stages({"stage": "sft"}, model)
    assert first == {"stage": "pretrain"} and second["source_card"] == {"license": "mit"}
    assert second["base_model"] == "tester/base" and second["base_revision"] == model.config._commit_hash
    resumed = tmp_path / "checkpoint-1"
    resumed.mkdir()
    write_record({"base_model": "tester/base", "stage": "sft"}, model, resumed)
    model.config._name_or_path, model.config._commit_hash = str(resumed), None
    assert stages({"base_model": "tester/base", "stage": "sft"}, model) == [first, second]
    hub.refuse = lambda method, path: Refusal(500, "down")
    model.config._name_or_path = "tester/base"
    model.config._commit_hash = "0" * 40
    assert [stage.get("source_card") for stage in stages({"stage": "sft"}, model)] == [None]
