"""GPU memory of LoRA on every matrix of an OLMoE-1B-7B with random weights: bfloat16 below it, and 4 bits.

    python benchmarks/qlora_gpu.py RESULT.json

One optimizer step of one row of 2,048 tokens, activations checkpointed, rank 8; needs bitsandbytes and peft.
"""

import gc
import json
import sys
import time
from pathlib import Path

import bitsandbytes
import peft
import torch
import transformers
from hf_moe.training.weights.adapters import AdapterArguments, add_adapter
from hf_moe.training.weights.groups import matrices
from hf_moe.training.weights.quantized import quantize

from hf_moe import HfMoeConfig, HfMoeForCausalLM

OLMOE = {
    "vocab_size": 50304,
    "hidden_size": 2048,
    "moe_intermediate_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "router_type": "softmax_topk",
    "norm_topk_prob": False,
    "qk_norm": "projection",
}
PARTS = ["attention", "routed_experts"]
STEPS, TOKENS = 4, 2048


def gib(count: int) -> float:
    return round(count / 2**30, 3)


def measure(base: str) -> dict:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    device = torch.device("cuda")
    torch.manual_seed(0)
    with device:
        model = HfMoeForCausalLM(HfMoeConfig(**OLMOE, dtype="bfloat16")).to(torch.bfloat16)
    row, said = {"base": base, "parameters": sum(x.numel() for x in model.parameters())}, None
    if base == "nf4":
        said = quantize(model, matrices(model), device)
    torch.cuda.synchronize()
    gc.collect()
    row["weights_gib"] = gib(torch.cuda.memory_allocated())
    model.activation_checkpointing_enable({"use_reentrant": False})
    adapted, covered = add_adapter(model, AdapterArguments(lora_parts=PARTS, lora_r=8))
    adapted.to(device).train()
    trained = [x for x in adapted.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4)
    ids = torch.randint(0, OLMOE["vocab_size"], (1, TOKENS), device=device)
    torch.cuda.reset_peak_memory_stats()
    losses, seconds = [], []
    for _ in range(STEPS):
        start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            loss = adapted(ids, labels=ids, output_router_logits=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        seconds.append(round(time.perf_counter() - start, 3))
    row |= {"peak_gib": gib(torch.cuda.max_memory_allocated()), "seconds_a_step": min(seconds), "losses": losses}
    return row | {"said": [x for x in (said, covered) if x], "trained": sum(x.numel() for x in trained)}


def main() -> None:
    versions = {x.__name__: x.__version__ for x in (torch, transformers, peft, bitsandbytes)}
    result = {"device": torch.cuda.get_device_name(), "versions": versions, "tokens": TOKENS}
    result["runs"] = [measure(base) for base in ("bfloat16", "nf4")]
    Path(sys.argv[1]).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
