"""Pruned models where hf_moe is not: in Transformers alone, and in llama.cpp.

llama.cpp needs HF_MOE_LLAMA_CPP, its sources, whose convert_hf_to_gguf.py is run, and HF_MOE_SMOLLM2, a folder with a
tokenizer that the script knows (the source package of llama-cpp-python holds the sources in vendor/llama.cpp).
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from hf_moe.conversion import prune
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from .test_greedy_text import named
from .test_reshape import CASES, TEXT, build, ids_of, load, ours, save

# hf_moe cannot be imported here, installed or not.
ALONE = """
import json, sys
sys.modules["hf_moe"] = None
import torch
from transformers import AutoModelForCausalLM
folder, ids, trusted = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "code"
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=trusted).eval()
model.set_experts_implementation("eager")
with torch.no_grad():
    logits = model(torch.tensor(ids)).logits
kinds = [type(module).__module__ for module in model.modules()]
print(json.dumps([type(model).__name__, sorted(kind for kind in set(kinds) if "hf_moe" in kind), logits.tolist()]))
"""


@pytest.mark.parametrize("family", ["hf_moe", *CASES])
def test_a_pruned_model_loads_without_hf_moe(family, tmp_path):
    if family == "hf_moe":
        save(ours(), tmp_path / "model")
    else:
        model_type, fields = CASES[family]
        save(build(model_type, **{**fields, "vocab_size": 512}), tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    pruned = tmp_path / "pruned"
    prune(tmp_path / "model", pruned, experts=4, calibration=tmp_path / "text.txt", verify=False, progress=False)
    model, ids = load(pruned), ids_of(pruned)[:, :17]
    with torch.no_grad():
        expected = model(ids).logits
    code = "code" if family == "hf_moe" else "none"
    script = [sys.executable, "-c", ALONE, pruned, json.dumps(ids.tolist()), code]
    env = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    run = subprocess.run(script, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    name, of_ours, logits = json.loads(run.stdout.splitlines()[-1])
    assert name == type(model).__name__ and bool(of_ours) == (family == "hf_moe")
    torch.testing.assert_close(torch.tensor(logits), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_llama_cpp_converts_a_pruned_model(family, tmp_path, monkeypatch):
    sources, tokenizer = named("HF_MOE_LLAMA_CPP"), AutoTokenizer.from_pretrained(named("HF_MOE_SMOLLM2"))
    monkeypatch.syspath_prepend(str(sources / "gguf-py"))
    from gguf import GGUFReader

    model_type, fields = CASES[family]
    build(model_type, **{**fields, "vocab_size": len(tokenizer)}).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    pruned, gguf = tmp_path / "pruned", tmp_path / "model.gguf"
    prune(tmp_path / "model", pruned, experts=4, calibration=tmp_path / "text.txt", verify=False, progress=False)
    script = [sys.executable, sources / "convert_hf_to_gguf.py", pruned, "--outfile", gguf, "--outtype", "f32"]
    run = subprocess.run(script, capture_output=True, text=True)
    print(run.stderr)
    assert run.returncode == 0, run.stderr[-2000:]

    reader = GGUFReader(gguf)
    architecture = reader.get_field("general.architecture").contents()
    assert architecture == model_type.replace("_", "")
    assert reader.get_field(f"{architecture}.expert_count").contents() == 4
    assert reader.get_field(f"{architecture}.expert_used_count").contents() == 3
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    with safe_open(pruned / "model.safetensors", "pt") as file:
        for layer in range(3):
            mlp = f"model.layers.{layer}.mlp"
            router = file.get_tensor(f"{mlp}.gate.weight")
            assert len(router) == 4 and torch.equal(found[f"blk.{layer}.ffn_gate_inp.weight"], router)
            for theirs, ours_ in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
                experts = [file.get_tensor(f"{mlp}.experts.{number}.{ours_}.weight") for number in range(4)]
                assert torch.equal(found[f"blk.{layer}.ffn_{theirs}_exps.weight"], torch.stack(experts))
    assert len(reader.tensors) == len(AutoModelForCausalLM.from_pretrained(pruned).state_dict()) + 3  # gate, up: apart
