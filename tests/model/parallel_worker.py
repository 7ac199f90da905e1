"""Run by torchrun on two processes: each saved model under each parallel layout against one process."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hf_moe  # noqa: F401
from hf_moe.model.host import CACHE
from tests.processes import leave

LAYOUTS = {
    "tensor-parallel": {"tp_size": 2, "tp_plan": "auto"},
    "tensor-and-expert-parallel": {"tp_size": 2, "ep_size": 2},
    "expert-parallel": {"fsdp_size": 2, "ep_size": 2},
    "fsdp": {"fsdp_size": 2},
}
WATCHED = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.0.self_attn.kv_a_layernorm.weight",
    "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
    "model.layers.0.self_attn.o_proj.weight",
    "model.layers.0.self_attn.o_experts",
    "model.layers.0.linear_attn.in_proj_qkv.weight",
    "model.layers.0.mlp.gate.weight",
    "model.layers.0.mlp.experts.act_fn.alpha_p",
    "model.layers.2.mlp.gate.weight",
    "model.mtp_layers.0.eh_proj.weight",
    "model.mtp_layers.0.block.mlp.gate.weight",
]


def run(model) -> dict[str, torch.Tensor]:
    ids = torch.arange(1, 23).view(2, 11)
    out = model(ids, labels=ids, **{"output_mtp_loss": True} if model.config.model_type == "hf_moe" else {})
    out.loss.backward()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        before = model(ids[:, :-1], use_cache=True)
        step = model(ids[:, -1:], **{CACHE: before.get(CACHE, before.get("past_key_values"))}).logits
    result = {"logits": out.logits.detach(), "step": step}
    result |= {name: parameters[name].grad for name in WATCHED if name in parameters}
    return {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in result.items()}


def main(folder: str):
    differences = {}
    for saved in sorted(Path(folder).iterdir()):
        expected = run(AutoModelForCausalLM.from_pretrained(saved))
        for layout, sizes in LAYOUTS.items():
            actual = run(AutoModelForCausalLM.from_pretrained(saved, distributed_config=DistributedConfig(**sizes)))
            worst = {n: ((actual[n] - x).abs().max() / x.abs().max()).item() for n, x in expected.items()}
            differences[f"{saved.name}/{layout}"] = worst
    leave(differences)


main(*sys.argv[1:])
