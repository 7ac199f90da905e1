"""Dense to mixture of experts: `upcycle`."""

import hashlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .families import DENSE_FAMILIES
from .output import convert, count_parameters
from .source import open_source, tensor_shapes
from .upcycling import UPCYCLERS
from .writer import Output, check_destination

# What of the dense network the rows of each expert tensor are, in order.
EXPERT_PARTS = {
    "gate_up_proj": ("gate_proj.weight", "up_proj.weight"),
    "gate_up_proj_bias": ("gate_proj.bias", "up_proj.bias"),
    "down_proj": ("down_proj.weight",),
    "down_proj_bias": ("down_proj.bias",),
}


def upcycle(
    src: str | Path,
    dst: str | Path,
    *,
    experts: int,
    top_k: int,
    strategy: str = "copy",
    layers: str = "all",
    router_std: float = 0.02,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
    dry_run: bool = False,
    verify: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Turn a dense checkpoint into a mixture of experts, tensor by tensor (Sparse Upcycling, arXiv 2212.05055).

    src: a folder with safetensors weights, or a Hub id. dst: a folder that does not exist or is empty.
    experts, top_k: feed-forward networks in each sparse layer, and how many of them a token meets.
    strategy: a key of `UPCYCLERS`. layers: which become sparse, "all" or such as "2-5,8", counted from 0.
    router_std: the router's weights are drawn from N(0, router_std) with `seed`, in fp32, then rounded to the
    checkpoint's dtype. dry_run: plan and report, write nothing. verify: compare the logits of both models.

    Returns a report that can be written as JSON: total_params, active_params, disk_bytes, output and, from `verify`,
    max_abs_diff and its companions. Raises ValueError or OSError of one line; then there is no output.
    """
    check_destination(Path(dst))
    if strategy not in UPCYCLERS:
        raise ValueError(f"strategy {strategy!r} is unknown; the strategies are {', '.join(UPCYCLERS)}.")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k ({top_k}) must be between 1 and the number of experts ({experts}).")
    if router_std < 0:
        raise ValueError(f"router_std ({router_std}) must not be negative.")
    source = open_source(src, DENSE_FAMILIES)
    num_layers = source.hf_moe_fields["num_hidden_layers"]
    sparse = parse_layers(layers, num_layers)
    dense = source.outputs(source.hf_moe_config(mlp_layer_types=["dense"] * num_layers))
    config = source.hf_moe_config(
        mlp_layer_types=["sparse" if layer in sparse else "dense" for layer in range(num_layers)],
        num_experts=experts,
        num_experts_per_tok=top_k,
        router_type="topk_softmax",  # weights that sum to 1, so that equal experts give the dense output
    )

    def feed_forward(layer: int) -> dict[str, Output]:
        prefix = f"model.layers.{layer}.mlp."
        return {name.removeprefix(prefix): output for name, output in dense.items() if name.startswith(prefix)}

    def router(layer: int, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        weight = torch.empty(shape).normal_(std=router_std, generator=seeded(seed, layer, "router"))
        yield weight.to(dtype)

    def expert_rows(layer: int, parts: tuple[str, ...]) -> Iterator[torch.Tensor]:
        ffn = {part: next(iter(output.pieces())) for part, output in feed_forward(layer).items()}
        for expert in UPCYCLERS[strategy](ffn, experts, seeded(seed, layer, "experts")):
            for part in parts:
                yield expert[part]

    outputs = []
    for name, shape in tensor_shapes(config).items():
        if name in dense:
            outputs.append(dense[name])
            continue
        layer, kind = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.(?:experts\.)?(.+)", name).groups()
        dtype = feed_forward(int(layer))["down_proj.weight"].dtype
        if kind == "gate.weight":
            pieces = partial(router, int(layer), shape, dtype)
        else:
            pieces = partial(expert_rows, int(layer), EXPERT_PARTS[kind])
        outputs.append(Output(name, dtype, shape, pieces))

    arguments = {"experts": experts, "top_k": top_k, "layers": layers, "router_std": router_std}
    return convert(
        source,
        config,
        outputs,
        dst,
        counts=count_parameters(outputs, config),
        provenance={"method": "upcycle", "strategy": strategy, "seed": seed, "arguments": arguments},
        max_shard_size=max_shard_size,
        dry_run=dry_run,
        check=verify,
        progress=progress,
    )


def seeded(seed: int, layer: int, purpose: str) -> torch.Generator:
    """A generator of its own for each layer and purpose, so that the order of writing does not matter."""
    digest = hashlib.sha256(f"{seed}/{layer}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def parse_layers(spec: str, num_layers: int) -> set[int]:
    """The layers that "all" or a list such as "2-5,8" names, counted from 0, both ends included."""
    if spec == "all":
        return set(range(num_layers))
    chosen: set[int] = set()
    for part in spec.split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if ends is None:
            raise ValueError(f"layers {spec!r} is not understood; write 'all' or a list such as '2-5,8'.")
        first, last = int(ends[1]), int(ends[2] or ends[1])
        if not first <= last < num_layers:
            raise ValueError(f"layers {spec!r}: {part.strip()} is not within 0-{num_layers - 1}.")
        chosen |= set(range(first, last + 1))
    return chosen
