"""`hf-moe generate`: the text that the model's own `generate` gives, from any causal language model."""

import json
import re
import shutil
import sys

import pytest
import torch
from hf_moe.training.weights.groups import matrices
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hf_moe.demo import DEMO_MODEL
from hf_moe.stored_weights import FORMS

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A random model of another architecture, with a tokenizer that has no chat template."""
    folder = tmp_path_factory.mktemp("gpt2")
    sizes = {"n_positions": 64, "n_embd": 24, "n_layer": 2, "n_head": 3}
    GPT2LMHeadModel(GPT2Config(vocab_size=512, bos_token_id=1, eos_token_id=2, **sizes)).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def expected(folder, prompt=PROMPT, tokens=20, **options):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    output = AutoModelForCausalLM.from_pretrained(folder).generate(**inputs, max_new_tokens=tokens, **options)[0]
    return tokenizer.decode(output, skip_special_tokens=True)


@pytest.mark.parametrize("kind", ["dense", "upcycled", "gpt2"])
def test_greedy_text_is_the_models_own(command, kind, request):
    folder = DEMO_MODEL if kind == "dense" else request.getfixturevalue(kind)
    code, out, _ = command("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 20)
    assert code == 0
    assert out == expected(folder, do_sample=False) + "\n"


@pytest.mark.parametrize("stored", ["fp8", "int4"])
def test_text_in_fewer_bits_is_that_of_the_values_they_stand_for(command, upcycled, tmp_path, stored):
    model = AutoModelForCausalLM.from_pretrained(upcycled)
    for name in matrices(model):
        weight = model.get_parameter(name)
        weight.data = FORMS[stored].quantize(weight.data).values()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(upcycled).save_pretrained(tmp_path)
    words = ("--prompt", PROMPT, "--max-new-tokens", 30)
    quantized = command("generate", upcycled, "--quantize", stored, *words)
    assert quantized.code == 0 and quantized.out == command("generate", tmp_path, *words).out
    assert quantized.out != command("generate", upcycled, *words).out or stored == "fp8"
    report = json.loads(command("verify", upcycled, upcycled, "--quantize", stored, "--json").out)
    same = json.loads(command("verify", upcycled, tmp_path, "--tolerance", 100, "--json").out)
    for name in ("max_abs_diff", "kl", "top1_agreement", "perplexity_a", "perplexity_b"):
        assert report[name] == pytest.approx(same[name], rel=1e-3), name
    assert report["kl"] > 1e-4


def test_what_is_quantised_already_is_not_quantised_again(command, upcycled, tmp_path):
    folder = tmp_path / "codes"
    shutil.copytree(upcycled, folder)
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    for words in (("generate", folder, "--prompt", PROMPT), ("verify", upcycled, folder)):
        code, _, err = command(*words, "--quantize", "int4")
        assert code == 2 and "is quantised already (fp8): load it as it is, without --quantize int4" in err


def test_the_upcycled_model_tells_the_dense_models_story(command, upcycled):
    dense, sparse = (command("generate", folder, "--prompt", PROMPT).out for folder in (DEMO_MODEL, upcycled))
    assert dense == sparse
    assert dense.startswith(PROMPT)
    assert dense.endswith("The end.\n")


def test_json_holds_what_was_streamed(command):
    words = ("generate", DEMO_MODEL, "--prompt", PROMPT, "--max-new-tokens", 20)
    report = json.loads(command(*words, "--json").out)
    assert PROMPT + report["text"] + "\n" == command(*words).out
    assert report["new_tokens"] == 20
    assert report["prompt_tokens"] == len(AutoTokenizer.from_pretrained(DEMO_MODEL)(PROMPT).input_ids)


def test_sampling_depends_on_seed_temperature_and_top_p(command):
    def sample(**options):
        words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
        return command("generate", DEMO_MODEL, "--prompt", PROMPT, "--max-new-tokens", 20, *words).out

    assert sample(temperature=1.5, seed=3) == sample(temperature=1.5, seed=3)
    assert len({sample(temperature=1.5, seed=seed) for seed in range(3)}) == 3
    # So small a share holds the likeliest token alone.
    assert sample(temperature=1.5, top_p=1e-6, seed=3) == sample()


def test_a_checkpoints_sampling_settings_do_not_reach_a_greedy_run(command, tmp_path):
    folder = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    sampling = {"do_sample": True, "temperature": 3.0, "top_k": 5, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(settings | sampling))
    words = ("--prompt", PROMPT, "--max-new-tokens", 20)
    assert command("generate", folder, *words).out == command("generate", DEMO_MODEL, *words).out


@pytest.mark.parametrize(
    "said", [{"return_dict_in_generate": True}, {"num_beams": 3}, {"stop_strings": ["brave"]}], ids=str
)
def test_a_checkpoints_generation_config_does_not_stop_a_greedy_run(said, command, tmp_path):
    folder = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | said))
    words = ("--prompt", PROMPT, "--max-new-tokens", 20)
    text = command("generate", DEMO_MODEL, *words).out
    stop = text.index("brave") + len("brave") if "stop_strings" in said else len(text) - 1
    assert command("generate", folder, *words).out == text[:stop] + "\n"


def test_ids_without_a_row_are_said(command, tmp_path):
    """Texts of one batch end at different tokens, and the shorter ones are padded."""
    folder = shutil.copytree(DEMO_MODEL, tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": 512}))
    words = ("--prompt", PROMPT, "--temperature", 1, "--best-of", 5, "--max-new-tokens", 200)
    code, out, err = command("generate", folder, *words)
    assert code == 0 and out.startswith(PROMPT)
    assert "model: pad_token_id 512 left out" in err and "generation_config.json: pad_token_id 512 left out" in err

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    code, _, err = command("generate", folder, "--prompt", "<extra>")
    assert code == 2 and "--prompt has the token 512, but" in err and "rows 0 to 511" in err.splitlines()[-1]


def test_chat_goes_through_the_template(command):
    request = "Tell a story about a brave frog named Zoe at the lake."
    result = command("generate", DEMO_MODEL, "--chat", "--prompt", request)
    prompt = f"<s><|user|>{request}<|assistant|>"
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    output = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).generate(ids, max_new_tokens=256, do_sample=False)
    assert result.out == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True) + "\n"


def test_a_mistake_of_the_chat_template_is_one_line(command, tmp_path):
    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0].content + 1 }}")
    code, out, err = command("generate", tmp_path / "model", "--chat", "--prompt", PROMPT)
    assert (code, out) == (2, "")
    said = "hf-moe: --prompt: the chat template refuses a conversation (TypeError: can only concatenate str"
    assert err.splitlines()[-1].startswith(said)


def test_chat_without_a_template_is_refused(command, gpt2):
    code, out, err = command("generate", gpt2, "--chat", "--prompt", PROMPT)
    assert (code, out) == (2, "")
    assert "chat template" in err.splitlines()[-1]


def test_code_of_a_checkpoint_runs_only_when_trusted(command, upcycled, tmp_path):
    folder = shutil.copytree(upcycled, tmp_path / "model")
    for file in ("config.json", "configuration_hf_moe.py"):
        # As if from a family that neither Transformers nor hf_moe knows.
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace('"hf_moe"', '"stranger"'))
    words = ("generate", folder, "--prompt", PROMPT, "--max-new-tokens", 20)
    refused = command(*words)
    assert (refused.code, refused.out) == (2, "")
    assert "trust_remote_code" in refused.err.splitlines()[-1]
    assert command(*words, "--trust-remote-code").out == command("generate", upcycled, *words[2:]).out


def test_half_precision_checkpoints_stay_in_half_precision(command, tmp_path):
    AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path)
    code, out, _ = command("generate", tmp_path, "--prompt", PROMPT, "--max-new-tokens", 20)
    assert code == 0
    assert out.startswith(PROMPT)


def test_a_json_schema_and_a_regular_expression_guide_the_text(command, tmp_path):
    pytest.importorskip("llguidance")
    schema = tmp_path / "schema.json"
    legs = {"type": "object", "properties": {"legs": {"enum": [2, 4]}}}
    schema.write_text(json.dumps(legs | {"required": ["legs"], "additionalProperties": False}))
    words = ("generate", DEMO_MODEL, "--prompt", PROMPT)
    report = json.loads(command(*words, "--json-schema", schema, "--json").out)
    assert json.loads(report["text"])["legs"] in (2, 4)
    assert report["complete"] is True
    code, out, _ = command(*words, "--regex", " [a-f]{1,5}!", "--temperature", 2.0)
    assert code == 0
    assert re.fullmatch(f"{PROMPT} [a-f]{{1,5}}!\n", out)
    cut = command(*words, "--regex", " [0-9]{20}", "--max-new-tokens", 5)
    assert (cut.code, len(cut.out)) == (1, len(PROMPT) + 6)
    assert cut.err.splitlines()[-1] == "hf-moe: after --max-new-tokens 5 the guided text is not complete."


def test_best_of_takes_the_likeliest_of_its_samples(command):
    words = ("generate", DEMO_MODEL, "--prompt", PROMPT, "--max-new-tokens", 12, "--temperature", 1.5, "--best-of", 3)
    report = json.loads(command(*words, "--json").out)
    scores = [candidate["mean_log_probability"] for candidate in report["candidates"]]
    assert len(set(scores)) == 3
    assert report["mean_log_probability"] == max(scores)
    assert report["candidates"][scores.index(max(scores))]["text"] == report["text"]
    assert command(*words).out == PROMPT + report["text"] + "\n"


def test_self_consistency_takes_the_answer_of_most(command):
    pytest.importorskip("llguidance")
    words = ("--prompt", PROMPT, "--temperature", 5.0, "--self-consistency", 9, "--regex", "so the answer is [12]")
    report = json.loads(command("generate", DEMO_MODEL, *words, "--json").out)
    answers = [candidate["answer"] for candidate in report["candidates"]]
    assert set(answers) == {"1", "2"}
    assert report["votes"] == answers.count(report["answer"]) > 4
    assert report["text"] == f"so the answer is {report['answer']}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--best-of", 2], "--best-of chooses among sampled texts; give a --temperature above 0 with it."),
        (["--self-consistency", 2], "--self-consistency chooses among sampled texts; give a --temperature"),
        (["--best-of", 2, "--self-consistency", 2], "--best-of and --self-consistency both choose the text"),
        (["--regex", "a", "--json-schema", __file__], "--json-schema and --regex both say what the text may be"),
        (["--json-schema", __file__], "is not JSON: "),
        (["--json-schema", "missing.json"], "does not exist"),
        (["--use-mtp"], "--use-mtp needs modules for multi-token prediction, but"),
        (["--use-mtp", "--best-of", 2, "--temperature", 1], "--use-mtp writes one text at a time"),
    ],
)
def test_what_does_not_go_together_is_one_line(command, words, message):
    code, out, err = command("generate", DEMO_MODEL, "--prompt", PROMPT, *words)
    assert (code, out) == (2, "")
    assert message in err.splitlines()[-1]


def test_a_schema_that_is_no_object_is_one_line(command, tmp_path):
    (tmp_path / "schema.json").write_text("[1]")
    code, out, err = command("generate", DEMO_MODEL, "--prompt", PROMPT, "--json-schema", tmp_path / "schema.json")
    assert (code, out) == (2, "")
    assert "schema.json must hold a JSON object, but holds [1]" in err.splitlines()[-1]


def test_guiding_without_its_package_names_the_extra(command, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    code, out, err = command("generate", DEMO_MODEL, "--prompt", PROMPT, "--regex", "a")
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].endswith("needs llguidance, which is not installed: pip install 'hf_moe[guided]'")


def test_drafts_of_mtp_modules_leave_the_greedy_text(command, upcycled, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(upcycled)
    model.add_mtp_layers(1)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(upcycled).save_pretrained(tmp_path)
    words = ("generate", tmp_path, "--prompt", PROMPT, "--max-new-tokens", 20)
    assert command(*words, "--use-mtp") == command(*words)
