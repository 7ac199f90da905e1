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
from .output import convert
from .upcycling import DEFAULT_STRATEGY
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


def upcycle(
    src: str | Path | Sequence[str | Path],
    dst: str | Path,
    *,
    experts: int,
    top_k: int,
    strategy: str = DEFAULT_STRATEGY,
    granularity: int = 1,
    shared: int | None = None,
    layers: str = "all",
    router_init: str | None = None,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
    dry_run: bool = False,
    resume: bool = False,
    verify: bool = True,
    progress: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Turn a dense checkpoint into a mixture of experts, tensor by tensor (Sparse Upcycling, arXiv 2212.05055).

    src: a folder with safetensors weights, or a Hub id; several for the strategy "merge". dst: a folder that does not
    exist or is empty. strategy: a key of `UPCYCLERS`; their files say what each does.
    experts, top_k: feed-forward networks in each sparse layer, and how many of them a token meets; with "split" and
    "carve" the pieces of one. granularity: cut each network into so many experts. shared: shared experts,
    1 where the strategy has some. layers: which become sparse, counted from 0: "all", "all/2" for every second,
    "2-5,8", or "0-3=copy,4-7=drop" with strategies of their own. router_init: a key of `ROUTER_INITS`; by default what
    the strategy calls for.

    options, of which one that nothing reads is refused:
    router_std: root mean square of the router's weights (0.02). They are worked out in fp32 from `seed`, then rounded
    to the checkpoint's dtype. prompts: a YAML or JSON list with the prompts of each expert. calibration: a text (.txt,
    or .jsonl, .csv, .parquet with a column "text") that the dense model reads, in memory, before the conversion.
    noise_scale, drop_ratio, carved, rest, domain_texts: see the strategies.

    dry_run: plan and report, write nothing. resume: go on with what an interrupted call has written. verify: compare
    the logits of both models.

    Returns a report that can be written as JSON: total_params, active_params, disk_bytes, output, equal_at_step_0
    (whether the strategy keeps the function) and, from `verify`, max_abs_diff and its companions; of a merge also
    domains, the comparison with each source. Raises ValueError or OSError of one line; then there is no output.
    """
    check_destination(Path(dst), resume)
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k ({top_k}) must be between 1 and the number of experts ({experts}).")
    if options.get("domain_texts") and not verify:
        raise ValueError("domain_texts has no effect with verify=False (--no-verify).")
    sources = [open_source(name, DENSE_FAMILIES) for name in ([src] if isinstance(src, (str, Path)) else src)]
    given = {"granularity": granularity if granularity != 1 else None, "shared": shared, **options}
    plan = Plan(
        sources,
        experts=experts,
        top_k=top_k,
        strategy=strategy,
        layers=layers,
        router_init=router_init,
        seed=seed,
        given={name: value for name, value in given.items() if value is not None},
    )
    config = sources[0].hf_moe_config(
        mlp_layer_types=["sparse" if layer in plan.layers else "dense" for layer in range(plan.num_layers)],
        router_type="topk_softmax",  # weights that sum to 1, so that equal experts give the dense output
        **plan.sizes.config_fields(),
    )
    outputs = [plan_output(plan, name, shape) for name, shape in tensor_shapes(config).items()]
    provenance = {"method": "upcycle", "strategy": plan.strategy_names, "seed": seed, "arguments": plan.arguments}
    domains = []
    if len(sources) > 1 and not dry_run:
        provenance["siblings"] = [origin(sibling) for sibling in sources[1:]]
        domains = list(zip(sources, options.get("domain_texts") or [None] * len(sources), strict=True))
    with torch.device("cpu"):  # where the generators are, whatever the default device
        report = convert(
            sources[0],
            config,
            outputs,
            dst,
            provenance=provenance,
            max_shard_size=max_shard_size,
            dry_run=dry_run,
            resume=resume,
            check=verify,
            progress=progress,
            memory=plan.memory,
            domains=domains,
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
