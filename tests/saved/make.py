"""Small folders as the installed release of hf_moe writes them, with what they compute: `python tests/saved/make.py`.

Run it once a release, on the newest host that it was tested with; what is committed here is never written again.
"""

import json
from pathlib import Path

import torch

import hf_moe

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "num_attention_heads": 4,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
VARIANTS = {
    "grouped_mtp": {
        "num_key_value_heads": 2,
        "qk_norm": "head",
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "router_type": "sigmoid_topk",
        "router_args": {"selection_bias": True},
        "num_mtp_layers": 1,
    },
    "latent": {
        "attention_type": "mla",
        "q_lora_rank": 12,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "router_type": "topk_softmax",
    },
    "null_experts": {
        "num_key_value_heads": 2,
        "router_type": "null_experts",
        "router_args": {"null_experts": 2, "selection_bias": True},
    },
    "graft": {
        "backbone": {
            "model_type": "gpt_neox",
            "vocab_size": 61,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "initializer_range": 0.3,
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
        "num_experts": 5,
        "router_type": "sigmoid_topk",
        "router_args": {"selection_bias": True},
    },
}
PROMPT, NEW = 7, 9


@torch.no_grad()
def make(folder: Path, fields: dict) -> None:
    torch.manual_seed(0)
    if "backbone" in fields:
        model = hf_moe.HfMoeGraftForCausalLM(hf_moe.HfMoeGraftConfig(**fields)).eval()
    else:
        model = hf_moe.HfMoeForCausalLM(hf_moe.HfMoeConfig(**SIZES, **fields)).eval()
    for name, buffer in model.named_buffers():
        if name.endswith(("e_score_correction_bias", "null_bias")):
            buffer.normal_(std=0.1)
    model.save_pretrained(folder)
    ids = torch.randint(1, SIZES["vocab_size"], (2, PROMPT))
    logits, text = model(ids, use_cache=False).logits, ids
    for _ in range(NEW):
        text = torch.cat((text, model(text, use_cache=False).logits[:, -1:].argmax(-1)), dim=1)
    said = {"ids": ids.tolist(), "logits": logits.tolist(), "text": text.tolist(), "mtp": "num_mtp_layers" in fields}
    (folder / "expected.json").write_text(json.dumps(said))


if __name__ == "__main__":
    for variant, fields in VARIANTS.items():
        folder = Path(__file__).parent / hf_moe.__version__ / variant
        if folder.exists():
            raise FileExistsError(f"{folder} is there: what a release wrote stays.")
        make(folder, fields)
