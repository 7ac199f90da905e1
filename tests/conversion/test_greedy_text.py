"""An upcycled SmolLM2, exported to Mixtral with an expert a tensor, tells the same greedy text in llama.cpp.

Needs the packages llama-cpp-python and gguf, and two folders: HF_MOE_SMOLLM2, the dense model, and HF_MOE_LLAMA_CPP,
llama.cpp's sources, whose convert_hf_to_gguf.py is run. (The source package of llama-cpp-python holds them in
vendor/llama.cpp.)
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_moe.conversion import export_checkpoint, upcycle
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ["The capital of France is", "Once upon a time there was a fox who", "def fibonacci(n):\n    "]
NEW_TOKENS = 40


@pytest.fixture(scope="module")
def folders() -> tuple[Path, Path]:
    for package in ("llama_cpp", "gguf"):
        pytest.importorskip(package)
    named = [os.environ.get(name) for name in ("HF_MOE_SMOLLM2", "HF_MOE_LLAMA_CPP")]
    if None in named:
        pytest.skip("needs HF_MOE_SMOLLM2 and HF_MOE_LLAMA_CPP")
    return tuple(map(Path, named))


@pytest.mark.parametrize("family", ["mixtral"])
def test_the_same_greedy_text(family, folders, tmp_path):
    from llama_cpp import Llama

    dense, llama_cpp = folders
    upcycle(dense, tmp_path / "moe", experts=4, top_k=2, verify=False, progress=False)
    native, gguf = tmp_path / "native", tmp_path / "model.gguf"
    export_checkpoint(tmp_path / "moe", native, to=family, layout="per-expert", verify=False, progress=False)
    script = [sys.executable, llama_cpp / "convert_hf_to_gguf.py", native, "--outfile", gguf, "--outtype", "f32"]
    run = subprocess.run(script, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]

    # Keys and values in float32, as in Transformers; llama.cpp's own default is float16.
    theirs = Llama(str(gguf), n_ctx=256, type_k=0, type_v=0, flash_attn=False, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(native)
    ours = AutoModelForCausalLM.from_pretrained(native, dtype=torch.float32).eval()
    for prompt in PROMPTS:
        ids = tokenizer(prompt).input_ids
        assert theirs.tokenize(prompt.encode(), add_bos=False) == ids
        told = ours.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(ids) :].tolist()
        theirs.reset()
        stream = theirs.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0)
        answered = [next(stream) for _ in range(len(told))]
        print(repr(tokenizer.decode(answered)))
        assert answered == told
