"""`hf-moe generate`: the text that the model's own `generate` gives, from any causal language model."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from hf_moe.demo import DEMO_MODEL

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


def test_chat_goes_through_the_template(command):
    request = "Tell a story about a brave frog named Zoe at the lake."
    result = command("generate", DEMO_MODEL, "--chat", "--prompt", request)
    prompt = f"<s><|user|>{request}<|assistant|>"
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    output = AutoModelForCausalLM.from_pretrained(DEMO_MODEL).generate(ids, max_new_tokens=256, do_sample=False)
    assert result.out == tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True) + "\n"


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
