"""Dense to mixture of experts: `upcycle`."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..staging import check_destination
from .families import DENSE_FAMILIES
from .files.hashing import Hashing
from .files.source import Source, open_source, tensor_shapes
from .files.writer import Output
from .options import UpcycleOptions, takes
from .output import convert
from .upcycling.plan import Plan
from .upcycling.strategy import Strategy

# What of the dense network the rows of each expert tensor are, in order.
EXPERT_PARTS = {
    "gate_up_proj": ("gate_proj.weight", "up_proj.weight"),
    "gate_up_proj_bias": ("gate_proj.bias", "up_proj.bias"),
    "up_proj": ("up_proj.weight",),
    "up_proj_bias": ("up_proj.bias",),
    "down_proj": ("down_proj.weight",),
    "down_proj_bias": ("down_proj.bias",),
}


@takes(UpcycleOptions)
def upcycle(src: str | Path | Sequence[str | Path], dst: str | Path, options: UpcycleOptions) -> dict[str, Any]:
    """Turn a dense checkpoint into a mixture of experts, tensor by tensor (Sparse Upcycling, arXiv 2212.05055).

    src: a folder with safetensors weights, or a Hub id; several for the strategy "merge". dst: a folder that does not
    exist or is empty. Keywords: the fields of UpcycleOptions.

    Returns a report that can be written as JSON: total_params, active_params, disk_bytes, output, equal_at_step_0
    (whether the strategy keeps the function) and, from `verify`, max_abs_diff and its companions; of a merge also
    domains, the comparison with each source. Raises ValueError or OSError of one line; then there is no output.
    """
    check_destination(Path(dst), options.resume)
    if not 1 <= options.top_k <= options.experts:
        raise ValueError(f"top_k ({options.top_k}) must be between 1 and the number of experts ({options.experts}).")
    if options.domain_texts and not options.verify:
        raise ValueError("domain_texts has no effect with verify=False (--no-verify).")
    sources = [open_source(name, DENSE_FAMILIES) for name in ([src] if isinstance(src, (str, Path)) else src)]
    plan = Plan(sources, options)
    config = sources[0].hf_moe_config(
        mlp_layer_types=["sparse" if layer in plan.layers else "dense" for layer in range(plan.num_layers)],
        router_type="topk_softmax",  # weights that sum to 1, so that equal experts give the dense output
        **plan.sizes.config_fields(),
    )
    outputs = [plan_output(plan, name, shape) for name, shape in tensor_shapes(config).items()]
    said = {"method": "upcycle", "strategy": plan.strategy_names, "seed": options.seed, "arguments": plan.arguments}
    domains = []
    if len(sources) > 1 and not options.dry_run:
        said["siblings"] = [origin(sibling) for sibling in sources[1:]]
        domains = list(zip(sources, options.domain_texts or [None] * len(sources), strict=True))
    with torch.device("cpu"):  # where the generators are, whatever the default device
        report = convert(
            sources[0], config, outputs, dst, options, provenance=said, memory=plan.memory, domains=domains
        )
    return report | {"equal_at_step_0": plan.exact}


def plan_output(plan: Plan, name: str, shape: tuple[int, ...]) -> Output:
    """One tensor of the new model."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.(.+)", name)
    if found is None or int(found[1]) not in plan.layers:
        return plan.rest(name)
    made, kind = plan.layers[int(found[1])], found[2]
    if kind == "gate.weight":
        pieces = partial(router_rows, plan, made)
    elif kind.startswith("shared_experts."):
        pieces = partial(shared_rows, made, kind.removeprefix("shared_experts."))
    else:
        pieces = partial(made.experts, EXPERT_PARTS[kind.removeprefix("experts.")])
    return Output(name, made.request.dtype, shape, pieces, made.held)


def router_rows(plan: Plan, strategy: Strategy) -> Iterator[torch.Tensor]:
    yield plan.router(strategy).to(strategy.request.dtype)


def shared_rows(strategy: Strategy, part: str) -> Iterator[torch.Tensor]:
    yield strategy.shared(part)


def origin(source: Source) -> dict[str, Any]:
    """Where a sibling came from."""
    with Hashing(source.checkpoint) as hashing:
        return {"source": source.name, "revision": source.revision, "sha256": hashing.digests()}
