"""What holds for every command: a light start, exit codes, one line per mistake, clean JSON."""

import json
import subprocess
import sys

import hf_moe.conversion
import pytest
import torch
from hf_moe_cli import main
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_moe.demo import DEMO_MODEL

SIZES = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def test_help_loads_nothing_heavy():
    heavy = {"torch", "transformers", "huggingface_hub", "safetensors", "datasets", "trl", "numpy"}
    program = (
        "import sys, hf_moe_cli\n"
        "codes = [hf_moe_cli.main(words) for words in ([], ['--help'], ['upcycle', '--help'], ['no-such-command'])]\n"
        f"print(codes, sorted({heavy} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[0, 0, 0, 2] []"
    assert result.stderr == "hf-moe: No such command 'no-such-command'. See hf-moe --help.\n"


def test_the_list_of_presets_loads_no_model_code():
    program = (
        "import sys, hf_moe_cli; hf_moe_cli.main(['presets']); print({'torch', 'transformers'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "set()"


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Inputs that are each wrong in one way, by name."""
    root = tmp_path_factory.mktemp("broken")
    full = root / "full"
    full.mkdir()
    (full / "a file").touch()
    cut = root / "cut"
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(cut)
    with (cut / "model.safetensors").open("r+b") as file:
        file.truncate(2000)
    unknown = root / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text('{"model_type": "no_such_type"}')
    recipe = root / "recipe.yaml"
    recipe.write_text(f"model_name_or_path: {DEMO_MODEL}\nlearning_rat: 1.0e-3\n")
    (root / "empty.jsonl").touch()
    adapter = root / "adapter"
    (adapter / "merged").mkdir(parents=True)
    (adapter / "merged" / "config.json").touch()
    return {path.stem: path for path in (full, cut, unknown, recipe, root / "empty.jsonl", adapter)} | {
        "missing": root / "none"
    }


ENOUGH = ("--experts", "4", "--top-k", "2")
MISTAKES = {
    "upcycle-missing-folder": (("upcycle", "{missing}", "{new}", *ENOUGH), "{missing}"),
    "upcycle-top-k": (("upcycle", DEMO_MODEL, "{new}", "--experts", "4", "--top-k", "5"), "(5)"),
    "upcycle-no-top-k": (("upcycle", DEMO_MODEL, "{new}", "--experts", "4"), "--top-k"),
    "upcycle-not-a-number": (("upcycle", DEMO_MODEL, "{new}", "--experts", "four", "--top-k", "2"), "--experts"),
    "upcycle-output-not-empty": (("upcycle", DEMO_MODEL, "{full}", *ENOUGH), "{full}"),
    "upcycle-strategy": (("upcycle", DEMO_MODEL, "{new}", *ENOUGH, "--strategy", "copi"), "'copi'"),
    "upcycle-no-shared": (
        ("upcycle", DEMO_MODEL, "{new}", *ENOUGH, "--strategy", "shared", "--shared", "0"),
        "shared (0)",
    ),
    "upcycle-layers": (("upcycle", DEMO_MODEL, "{new}", *ENOUGH, "--layers", "2-9"), "2-9"),
    "upcycle-shard-size": (("upcycle", DEMO_MODEL, "{new}", *ENOUGH, "--max-shard-size", "big"), "'big'"),
    "upcycle-truncated": (("upcycle", "{cut}", "{new}", *ENOUGH), "truncated"),
    "upcycle-unknown-architecture": (("upcycle", "{unknown}", "{new}", *ENOUGH), "no_such_type"),
    "upcycle-unknown-option": (("upcycle", DEMO_MODEL, "{new}", *ENOUGH, "--expert", "4"), "--expert"),
    "import-missing-folder": (("import", "{missing}", "{new}"), "{missing}"),
    "import-dense": (("import", DEMO_MODEL, "{new}"), "llama"),
    "verify-missing-folder": (("verify", DEMO_MODEL, "{missing}"), "{missing}"),
    "verify-missing-data": (
        ("verify", DEMO_MODEL, DEMO_MODEL, "--data", "{missing}"),
        "There is no file {missing}",
    ),
    "verify-tolerance": (("verify", DEMO_MODEL, DEMO_MODEL, "--tolerance", "-1"), "See hf-moe verify --help"),
    "verify-vocabularies": (("verify", DEMO_MODEL, "{other}"), "61"),
    "train-missing-recipe": (("train", "{missing}"), "{missing}"),
    "train-unknown-key": (("train", "{recipe}"), "learning_rat"),
    "train-unknown-option": (("train", "tiny/sft", "--learning_rat", "1e-3"), "learning_rat"),
    "train-missing-data": (
        (
            "train",
            "tiny/sft",
            f"--model_name_or_path={DEMO_MODEL}",
            "--train_data={missing}.jsonl",
            "--output_dir={new}",
        ),
        "{missing}.jsonl",
    ),
    "generate-missing-folder": (("generate", "{missing}", "--prompt", "a"), "{missing}"),
    "generate-no-folder": (
        ("generate", "no-such-model", "--prompt", "a"),
        "no-such-model is no folder here",
    ),
    "generate-no-model": (("generate", "{full}", "--prompt", "a"), "give the folder of a saved model"),
    "generate-adapter": (("generate", "{adapter}", "--prompt", "a"), "give {adapter}/merged"),
    "inspect-no-model": (("inspect", "{full}"), "config.json does not exist; give the folder of a saved model"),
    "generate-truncated": (("generate", "{cut_with_tokenizer}", "--prompt", "a"), "header"),
    "generate-no-tokenizer": (("generate", "{other}", "--prompt", "a"), "{other}"),
    "generate-no-prompt": (("generate", DEMO_MODEL), "--prompt"),
    "generate-top-p": (("generate", DEMO_MODEL, "--prompt", "a", "--top-p", "0.5"), "--temperature"),
    "generate-temperature": (("generate", DEMO_MODEL, "--prompt", "a", "--temperature", "-1"), "--temperature"),
    "card-missing-folder": (("card", "{missing}"), "{missing}"),
    "card-damaged-weights": (("card", "{cut}"), "cut short"),
    "push-missing-folder": (("push", "{missing}", "me/model"), "{missing}"),
    "push-repository-name": (("push", "{full}", "me/my model"), "'me/my model'"),
    "demo-output-not-empty": (("demo", "--out", "{full}"), "{full}"),
    "no-such-command": (("upcycel",), "upcycel"),
}


@pytest.fixture(scope="module")
def other(broken, tmp_path_factory):
    """A sound model with another vocabulary and no tokenizer, and the truncated one with a tokenizer."""
    folder = tmp_path_factory.mktemp("other")
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(folder)
    cut = tmp_path_factory.mktemp("cut_with_tokenizer")
    for source in (DEMO_MODEL, broken["cut"]):
        for file in source.iterdir():
            (cut / file.name).write_bytes(file.read_bytes())
    return {"other": folder, "cut_with_tokenizer": cut}


@pytest.mark.parametrize(("words", "named"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line(command, broken, other, tmp_path, words, named):
    places = {**broken, **other, "new": tmp_path / "new"}
    code, out, err = command(*(str(word).format(**places) for word in words))
    *before, line = err.splitlines()
    assert (code, out) == (2, "")
    assert line.startswith("hf-moe: ")
    assert named.format(**places) in line
    assert not any("Traceback" in earlier or earlier.startswith("hf-moe:") for earlier in before)
    assert list(tmp_path.iterdir()) == []  # nothing is left behind, under any name


def test_help_of_train_names_the_recipe(command):
    assert "RECIPE" in command("train", "--help").out


@pytest.mark.parametrize("source", ["dense", "mixtral"])
def test_conversion_reports_one_json_object(command, tmp_path, source):
    if source == "dense":
        words = ("upcycle", DEMO_MODEL, tmp_path / "out", *ENOUGH)
    else:
        config = MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2)
        MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
        words = ("import", tmp_path / "mixtral", tmp_path / "out")
    planned = json.loads(command(*words, "--dry-run", "--json").out)
    assert not (tmp_path / "out").exists()
    code, out, _ = command(*words, "--json")
    report = json.loads(out)
    assert code == 0
    assert report["max_abs_diff"] <= 1e-4
    assert report["output"] == str(tmp_path / "out")
    assert report["active_params"] < report["total_params"] == planned["total_params"]


def test_conversion_can_leave_the_comparison_out(command, tmp_path):
    code, out, _ = command("upcycle", DEMO_MODEL, tmp_path / "out", *ENOUGH, "--no-verify")
    assert code == 0
    assert "total params" in out
    assert "max abs diff" not in out


def test_verify_fails_beyond_the_tolerance(command, upcycled, tmp_path):
    code, out, _ = command("verify", DEMO_MODEL, upcycled, "--json")
    assert code == 0
    assert set(json.loads(out)) >= {"max_abs_diff", "mean_abs_diff", "kl", "top1_agreement"}
    model = LlamaForCausalLM.from_pretrained(DEMO_MODEL)
    with torch.no_grad():
        model.model.norm.weight *= 1.1
    model.save_pretrained(tmp_path / "changed")
    words = ("verify", DEMO_MODEL, tmp_path / "changed", "--json")
    code, out, err = command(*words)
    assert code == 1
    assert err.splitlines()[-1].startswith("hf-moe: the logits differ by up to")
    difference = json.loads(out)["max_abs_diff"]
    assert command(*words, "--tolerance", difference).code == 0


def test_verify_reads_the_text_it_is_given(command, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a clever fox named Zoe.")
    words = ("verify", DEMO_MODEL, DEMO_MODEL, "--json")
    given, default = (json.loads(command(*words, *more).out) for more in (("--data", text), ()))
    assert given["tokens"] < default["tokens"]
    assert given["max_abs_diff"] == 0


def raising(error):
    def replacement(*args, **kwargs):
        raise error

    return replacement


def test_an_interrupt_ends_quietly(command, monkeypatch):
    monkeypatch.setattr(hf_moe.conversion, "verify", raising(KeyboardInterrupt()))
    assert command("verify", "a", "b") == (130, "", "")


def test_an_interrupted_conversion_says_how_to_go_on(command, monkeypatch, tmp_path):
    words = ("upcycle", DEMO_MODEL, tmp_path / "out", *ENOUGH, "--no-verify", "--json")
    with monkeypatch.context() as patch:
        patch.setattr(hf_moe.conversion.output, "write_shards", raising(KeyboardInterrupt()))
        code, out, err = command(*words)
    last = err.splitlines()[-1]
    assert (code, out) == (130, "")
    assert last == f"hf-moe: interrupted; what is done is in {tmp_path}/.out.partial, go on with --resume."
    assert command(*words).code == 2
    assert json.loads(command(*words, "--resume").out)["output"] == str(tmp_path / "out")


@pytest.mark.parametrize("fault", [RuntimeError("ours"), ImportError("ours", name="hf_moe.none")])
def test_our_own_faults_keep_their_traceback(monkeypatch, fault):
    monkeypatch.setattr(hf_moe.conversion, "verify", raising(fault))
    with pytest.raises(type(fault), match="ours"):
        main(["verify", "a", "b"])


def test_a_host_that_is_refused_is_one_line(command, monkeypatch):
    monkeypatch.setattr(hf_moe.conversion, "verify", raising(ImportError("needs Transformers 5.21 or newer")))
    code, _, err = command("verify", "a", "b")
    assert (code, err) == (2, "hf-moe: needs Transformers 5.21 or newer\n")


@pytest.mark.parametrize(("fault", "said"), [(MemoryError(), "out of memory"), (MemoryError("no 9 EiB"), "no 9 EiB")])
def test_a_lack_of_memory_is_one_line(command, monkeypatch, fault, said):
    monkeypatch.setattr(hf_moe.conversion, "verify", raising(fault))
    code, _, err = command("verify", "a", "b")
    assert code == 2 and err.startswith(f"hf-moe: {said}: give a smaller") and err.count("\n") == 1


def test_a_contradiction_in_the_config_is_one_line(command, monkeypatch):
    def verify(*args, **kwargs):
        hf_moe.HfMoeConfig(num_experts=2, num_experts_per_tok=5)

    monkeypatch.setattr(hf_moe.conversion, "verify", verify)
    code, _, err = command("verify", "a", "b")
    assert code == 2
    assert err == "hf-moe: num_experts_per_tok (5) must be between 1 and num_experts (2).\n"


def test_a_missing_extra_is_named(command, monkeypatch):
    if "hf_moe.training" in sys.modules:  # the package keeps the module, too: it comes back with the others
        monkeypatch.setattr(hf_moe, "training", sys.modules["hf_moe.training"])
    for name in [name for name in sys.modules if name.split(".")[0] == "trl" or name.startswith("hf_moe.training")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    code, _, err = command("train", "tiny/sft")
    assert code == 2
    assert err == "hf-moe: this command needs trl, which is not installed: pip install 'hf_moe[train]'\n"
