"""No trained weight is lost by what goes with it: that is tried before the first step, and comes after in the end."""

import json
import shutil

import pytest
import torch
from accelerate import Accelerator
from hf_moe.training.balance.moe_arguments import MoeTrainingArguments
from hf_moe.training.main import main
from hf_moe.training.output import saving
from hf_moe.training.trainers.sft_trainer import MoeSFTTrainer
from hf_moe.training.trainers.trainer import MoeTrainer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig

from hf_moe.generation_settings import FLAGS, mend_generation_config, objection

from .models import collate, hf_moe, mixtral, rows


@pytest.fixture
def base(model_folder, tmp_path):
    """base(generation config, fields of the config) -> a folder of the tiny model that says them."""

    def make(generation=None, **config):
        folder = shutil.copytree(model_folder, tmp_path / "base")
        for name, said in (("generation_config.json", generation), ("config.json", config)):
            known = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(known | (said or {})))
        return folder

    return make


@pytest.fixture
def run(data_folder, tmp_path):
    def train(model, *extra):
        given = {
            "model_name_or_path": model,
            "train_data": data_folder / "train.jsonl",
            "output_dir": tmp_path / "out",
        }
        words = [f"--{name}={value}" for name, value in given.items()]
        words += ["--max_steps=2", "--save_strategy=no", "--disable_tqdm=true", *map(str, extra)]
        return main(["tiny/sft", *words])

    return train


def files(folder):
    return sorted(path.name for path in folder.rglob("*")) if folder.exists() else []


ADAPTER = ("--lora_parts", "attention", "routed_experts", "--lora_merge", "float32")
KINDS = {"model": ((), "model"), "adapter": (ADAPTER, "adapter_model"), "rows": (("--esft_p=0.3",), "expert_rows")}


@pytest.mark.parametrize(("extra", "weights"), KINDS.values(), ids=KINDS)
def test_flags_without_an_effect_cost_no_weights(base, run, tmp_path, capsys, extra, weights):
    model = base({"temperature": 0.7, "top_p": 0.9, "eos_token_id": [2, 900]})
    run(model, *extra, "--save_strategy=steps", "--save_steps=1")
    said = capsys.readouterr().err
    assert "temperature 0.7 (without effect: do_sample is not set)" in said and "eos_token_id [2, 900]" in said
    assert (tmp_path / "out" / f"{weights}.safetensors").is_file()
    assert (tmp_path / "out" / "checkpoint-1" / f"{weights}.safetensors").is_file()
    if weights == "model":
        config = json.loads((tmp_path / "out" / "generation_config.json").read_text())
        assert "temperature" not in config and config["eos_token_id"] == [2]
        AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")


WRONG = {
    "num_beams": {"num_return_sequences": 3},
    "cache": {"cache_implementation": "bogus"},
    "length": {"max_new_tokens": 0},
}


@pytest.mark.parametrize("said", WRONG.values(), ids=WRONG)
def test_a_generation_config_that_does_not_load_is_named(base, run, tmp_path, said):
    with pytest.raises(ValueError, match=r"base/generation_config.json cannot be used, so correct or remove it") as e:
        run(base(said))
    assert "\n" not in str(e.value) and not files(tmp_path / "out")


VALUES = {
    **{"temperature": 0.7, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "top_h": 0.4, "typical_p": 0.8},
    **{"epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "early_stopping": True, "length_penalty": 2.0},
    **{"cache_implementation": "static", "cache_config": {"max_cache_len": 8}},
}


@pytest.mark.parametrize("name", [name for names in FLAGS.values() for name in names])
def test_each_flag_without_an_effect_is_left_out(name):
    config = GenerationConfig(use_cache=False, **{name: VALUES.get(name, True)})
    assert name in objection(config)
    assert name in mend_generation_config(config, 9) and getattr(config, name) is None
    assert mend_generation_config(config, 9) is None


def test_flags_that_have_an_effect_stay():
    config = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=[2, 8])
    assert mend_generation_config(config, 9) is None and config.temperature == 0.7 and config.eos_token_id == [2, 8]


def test_what_could_not_be_saved_is_refused_before_the_first_step(base, run, tmp_path, monkeypatch):
    def refuse(self, *args, **kwargs):
        raise OSError("no such codec")

    monkeypatch.setattr("trl.SFTTrainer.train", lambda *x, **y: pytest.fail("it trained"))
    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", refuse)
    with pytest.raises(ValueError, match=r"What goes with the weights cannot be saved to output_dir .*no such codec"):
        run(base())
    assert not files(tmp_path / "out")


def test_a_disk_without_room_is_refused_with_both_sizes(base, run, tmp_path, monkeypatch):
    monkeypatch.setattr(saving.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 0, 10**5))
    with pytest.raises(OSError, match=r"writes about 0\.\d\d GB to output_dir .*, but its disk has 0\.00 GB free"):
        run(base(), "--save_strategy=steps", "--save_steps=1")
    assert not files(tmp_path / "out")


def test_room_is_counted_as_it_is_taken(base, run, tmp_path, monkeypatch):
    """Of a run that keeps two checkpoints, three while it changes them."""
    counted = []
    monkeypatch.setattr(saving, "check_room", lambda output, needed, args: counted.append(needed))
    given = ["--save_strategy=steps", "--save_steps=1", "--save_total_limit=2", "--save_dtype=bfloat16"]
    run(base(), *given, "--max_steps=6")
    weights, optimizer = (tmp_path / "out" / "checkpoint-6" / name for name in ("model.safetensors", "optimizer.pt"))
    final = tmp_path / "out" / "model.safetensors"
    code = [path for path in weights.parent.iterdir() if path.suffix in (".py", ".json")]
    beside = sum(path.stat().st_blocks * saving.BLOCK for path in code)
    taken = 3 * (weights.stat().st_size + optimizer.stat().st_size + beside) + final.stat().st_size + beside
    assert counted == [pytest.approx(taken + saving.LOGS, rel=0.1)]


def test_on_a_disk_that_is_full_in_the_end_what_was_cut_short_makes_room(tmp_path):
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"cut")
    made = trainer(hf_moe(), tmp_path)
    with pytest.raises(OSError, match=r"No space left on device. The weights alone are in .*weights-0"):
        saving.keep_weights(made, tmp_path / "cut", None, OSError("No space left on device"))
    assert files(tmp_path) == ["cut", "model.safetensors", "weights-0"] and not files(tmp_path / "cut")


@pytest.mark.parametrize("what", ["evaluate", "save_metrics", "create_model_card"])
def test_weights_are_there_whatever_comes_after(base, run, data_folder, tmp_path, monkeypatch, what):
    before = getattr(MoeSFTTrainer, what)

    def fail(self, *args, **kwargs):
        if (tmp_path / "out" / "model.safetensors").is_file():
            raise OSError("no luck")
        return before(self, *args, **kwargs)

    monkeypatch.setattr(MoeSFTTrainer, what, fail)
    message = rf"The trained weights are saved to {tmp_path / 'out'}, but what comes after them failed: no luck"
    with pytest.raises(OSError, match=message):
        run(base(), f"--eval_data={data_folder / 'val.jsonl'}")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_adapter_is_there_where_merging_fails(base, run, tmp_path, monkeypatch):
    def fail(*args):
        raise ValueError("no luck")

    monkeypatch.setattr("hf_moe.training.stages.trained.merge_adapter", fail)
    with pytest.raises(ValueError, match=r"saved to .*/out, but what comes after them failed: no luck"):
        run(base(), *ADAPTER)
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def trainer(model, folder, **given):
    args = MoeTrainingArguments(folder, max_steps=1, report_to="none", save_strategy="no", **given)
    return MoeTrainer(model, args, train_dataset=rows(8), data_collator=collate)


@pytest.mark.parametrize("build", [hf_moe, mixtral])
def test_from_python_the_weights_alone_are_kept(build, tmp_path, monkeypatch):
    """A save that fails, as by a generation config that was changed meanwhile."""
    model = build()
    made = trainer(model, tmp_path)
    made.train()
    model.generation_config.num_return_sequences = 3
    with pytest.raises(OSError, match=rf"saved/x could not be saved: .*The weights alone are in {tmp_path}/weights-1"):
        made.save_model(f"{tmp_path}/saved/x")
    kept = load_file(tmp_path / "weights-1" / "model.safetensors")
    trained = {name: x.cpu() for name, x in model.state_dict().items()}
    assert all(torch.equal(kept[name], x) for name, x in trained.items())
    model.config.save_pretrained(tmp_path / "weights-1")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "weights-1").state_dict()
    assert all(torch.equal(again[name], x) for name, x in trained.items())


def test_from_python_flags_are_mended(tmp_path):
    model = hf_moe()
    model.generation_config.temperature = 0.3
    made = trainer(model, tmp_path)
    made.train()
    model.generation_config.top_p = 0.2  # set meanwhile
    made.save_model()
    said = json.loads((tmp_path / "generation_config.json").read_text())
    assert not {"temperature", "top_p"} & said.keys()


def test_every_process_waits_until_the_model_is_saved(run, base, tmp_path, monkeypatch):
    """One that ended while the first still gathers its shards would leave that waiting for good."""
    there = []
    monkeypatch.setattr(Accelerator, "wait_for_everyone", lambda self: there.append(files(tmp_path / "out")))
    run(base())
    assert any("model.safetensors" in names and "config.json" in names for names in there)
