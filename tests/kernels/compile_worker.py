"""A decoding step's kernels, compiled for a Hopper card without one: what Triton's interpreter does not refuse.

Prints the kernels, and the bytes of shared memory that a program of each takes.
"""

import json
from collections.abc import Callable
from functools import partial

import torch
from hf_moe.training.weights.groups import matrices
from hf_moe.training.weights.quantized import quantize
from peft import LoraConfig, get_peft_model
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import ty_to_cpp
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hf_moe import HfMoeConfig, HfMoeForCausalLM
from hf_moe.kernels.decode import experts, fused, turned_network
from hf_moe.kernels.formula import Formula
from hf_moe.model.decoding import HfMoeReservedCache

SIZES = {"vocab_size": 64, "hidden_size": 256, "intermediate_size": 192, "moe_intermediate_size": 96}
SIZES |= {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"], "num_attention_heads": 4, "pad_token_id": 0}
SIZES |= {"num_experts": 16, "num_experts_per_tok": 4, "n_shared_experts": 1, "max_position_embeddings": 8192}
LATENT = {"kv_lora_rank": 128, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64}
ATTENTIONS = {
    "grouped": {"head_dim": 64, "num_key_value_heads": 2, "qk_norm": "projection"},
    "latent": {"attention_type": "mla", "n_group": 4, "topk_group": 2, **LATENT},
}


class NoCard:
    """A driver whose card is a Hopper that nothing is launched on."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_device_interface(self):
        return torch.cuda

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind):
        return ty_to_cpp(kind)


def store(model: nn.Module, stored: str) -> None:
    """Its matrices in fewer bits."""
    quantize(model, matrices(model), None, stored)


def adapt(model: nn.Module, rank: int) -> None:
    """Adapters on some linear layers, and on experts."""
    names = [name for name, x in model.named_parameters() if x.ndim == 3]
    get_peft_model(model, LoraConfig(r=rank, target_modules=["q_proj", "o_proj"], target_parameters=names))


# What is done to a model: its kernels are others.
CHANGES = {"fp8": partial(store, stored="fp8"), "int4": partial(store, stored="int4")}
CHANGES |= {"adapter": partial(adapt, rank=16), "adapter of rank 1": partial(adapt, rank=1)}


def step(attention: str, rows: int, positions: int, change: Callable[[nn.Module], None] | None = None) -> None:
    """Launch a step's kernels on numbers that don't matter."""
    torch.set_default_dtype(torch.bfloat16)
    model = HfMoeForCausalLM(HfMoeConfig(**SIZES, **ATTENTIONS[attention])).eval()
    torch.set_default_dtype(torch.float32)
    if change is not None:
        change(model)
    cache = HfMoeReservedCache(2, positions)
    cache.unfinished = torch.ones(rows, dtype=torch.bool) if rows > 1 else None  # as a recorded step has it
    ids = torch.zeros(rows, 1, dtype=torch.long)
    model(ids, past_key_values=cache)
    with fused(model, rows):
        for layer in cache.layers:
            layer.recorded = True
        model(ids, position_ids=ids, past_key_values=cache)


def report(run: Callable[[], None]) -> None:
    """Run what launches kernels, compile them instead, and print how much shared memory each takes."""
    launch, memory = JITFunction.run, {}

    def compiled(kernel, *args, grid, warmup, **options):
        made = launch(kernel, *args, grid=grid, warmup=True, **options)
        name = f"{kernel.fn.__module__.split('.')[-1]}.{kernel.fn.__name__}"
        memory[name] = max(memory.get(name, 0), made.metadata.shared)
        return made

    driver.set_active(NoCard())
    JITFunction.run = compiled
    run()
    print(json.dumps(memory))


@torch.no_grad()
def steps() -> None:
    for attention in ATTENTIONS:
        for rows, positions in ((1, 256), (1, 8192), (4, 256), (16, 256)):
            step(attention, rows, positions)
    for name, change in CHANGES.items():
        for rows in (1, 16)[: 1 if "adapter" in name else 2]:
            step("grouped", rows, 256, change)


@torch.no_grad()
def turned() -> None:
    """Experts whose weights are stored as [E, in, out], of gpt-oss's sizes."""
    for formula in (Formula("quick_gelu", True, True, True, 7.0, 1.0), Formula("silu", True, True)):
        up, down = torch.zeros(2, 2880, 5760, dtype=torch.bfloat16), torch.zeros(2, 2880, 2880, dtype=torch.bfloat16)
        network = turned_network(up, down, True, formula.interleaved, (up[:, 0], down[:, 0]))
        for tokens in (1, 33):
            x, index = torch.zeros(tokens, 2880, dtype=torch.bfloat16), torch.zeros(tokens, 2, dtype=torch.long)
            experts.mixture(x, index.bfloat16(), index, network, None, formula)


if __name__ == "__main__":
    report(lambda: (steps(), turned()))
