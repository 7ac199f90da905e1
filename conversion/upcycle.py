"""Dense to mixture of experts: `upcycle`."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..model.modeling_hf_moe_graft import EXPERT_PARTS
from ..staging import check_destination
from .families import DENSE_FAMILIES
from .files.checkpoint import read_config
from .files.graft_source import GraftSource, open_graft
from .files.hashing import Hashing
from .files.source import Place, Source, locate, open_source
from .files.text_part import TEXT_PARTS
from .files.writer import Output
from .options import UpcycleOptions, takes
from .output import convert
from .upcycling.plan import Plan
from .upcycling.strategy import Strategy


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
    first, *others = [src] if isinstance(src, (str, Path)) else src
    place = locate(first)
    grafts = partial(open_graft, trust_remote_code=options.trust_remote_code)
    opening = grafts if options.graft or options.trust_remote_code or not has_table(place) else open_dense
    sources = [opening(place), *map(opening, others)]
    plan = Plan(sources, options)
    config = plan.dense.mixture(list(plan.layers), plan.widths)
    outputs = [plan_output(plan, name, shape) for name, shape in plan.dense.shapes(config).items()]
    said = {
        "method": "upcycle",
        "strategy": plan.strategy_names,
        "seed": options.seed,
        "arguments": plan.arguments,
    }
    if sources[0].code:
        said["remote_code"] = sources[0].code
    domains = []
    if len(sources) > 1 and not options.dry_run:
        said["siblings"] = [origin(sibling) for sibling in sources[1:]]
        domains = list(zip(sources, options.domain_texts or [None] * len(sources), strict=True))
    with torch.device("cpu"):  # where the generators are, whatever the default device
        report = convert(
            sources[0], config, outputs, dst, options, provenance=said, memory=plan.memory, domains=domains
        )
    return report | {"equal_at_step_0": plan.exact, "becomes": plan.dense.becomes}


def has_table(place: Place) -> bool:
    """Whether hf_moe's own architecture can be this model."""
    model_type = read_config(place.folder).get("model_type")
    return model_type in DENSE_FAMILIES or getattr(TEXT_PARTS.get(model_type), "family", None) in DENSE_FAMILIES


def open_dense(name: str | Path | Place) -> Source:
    """A source for hf_moe's own architecture. Raises ValueError, with the other way out where there is one."""
    return open_source(name, DENSE_FAMILIES)


def plan_output(plan: Plan, name: str, shape: tuple[int, ...]) -> Output:
    """One tensor of the new model."""
    layer, kind = plan.dense.place(name) or (None, "")
    if layer not in plan.layers:
        return plan.rest(name)
    own = plan.dense.own(layer, kind)
    if own is not None:
        return own._replace(name=name)
    made = plan.layers[layer]
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


def origin(source: Source | GraftSource) -> dict[str, Any]:
    """Where a sibling came from."""
    with Hashing(source.checkpoint) as hashing:
        return {"source": source.name, "revision": source.revision, "sha256": hashing.digests()}
