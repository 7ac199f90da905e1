"""An hf_moe checkpoint to a released family: `export_checkpoint`."""

import math
import reprlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..model.configuration_hf_moe import HfMoeConfig
from .computation import READ_IF, TRAINING_FIELDS, computation, respelled
from .families import FAMILIES, Family
from .families.family import EXPERT, Rows, same
from .output import convert, count_parameters
from .source import built, open_source
from .writer import Output, check_destination

# What an hf_moe checkpoint is read by: every field and every tensor under its own name.
HF_MOE = Family(HfMoeConfig.model_type, fields=same(*HfMoeConfig.__annotations__))


def export_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    to: str,
    layout: str = "per-expert",
    drop_mtp: bool = False,
    max_shard_size: int | str = "5GB",
    dry_run: bool = False,
    verify: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Turn an hf_moe checkpoint into one of a family of `FAMILIES`, with the same weights, bit for bit.

    src: a folder with an hf_moe checkpoint, or a Hub id. dst: a folder that does not exist or is empty. to: a key of
    `FAMILIES`. layout: "per-expert" (a tensor for each expert and projection, as released) or "fused" (as Transformers
    5 has them in memory). drop_mtp: leave out the layers for multi-token prediction. dry_run: plan and report, write
    nothing. verify: compare the logits of Transformers' own class with hf_moe's; refused where there is none.

    Returns a report that can be written as JSON: total_params, active_params, disk_bytes, output, training_fields
    (those that only training reads and the family has no place for) and, from `verify`, max_abs_diff and its
    companions. Raises a ValueError that names what the family cannot hold, or an OSError; then there is no output.
    """
    check_destination(Path(dst))
    if to not in FAMILIES:
        raise ValueError(f"to={to!r} is no family that hf_moe writes; it writes {', '.join(FAMILIES)}.")
    family = FAMILIES[to]
    if layout not in family.layouts:
        raise ValueError(f"layout {layout!r} is unknown to {to}; it can be {' or '.join(family.layouts)}.")
    ignored = (r"model\.mtp_layers\..+",) if drop_mtp else ()
    source = open_source(src, {HF_MOE.model_type: replace(HF_MOE, ignored_tensors=ignored)})
    config = source.hf_moe_config()
    if drop_mtp:
        config.num_mtp_layers = 0
    exported, training_fields = family_config(family, config)
    outputs = source.outputs(config)
    rows = {**family.tensors, **family.layouts[layout]}
    parts = [part for output in outputs.values() for part in split(output, family, rows, config)]
    copies = [outputs[name]._replace(name=copy) for copy, name in family.copies(config).items() if name in outputs]
    if verify and not dry_run and family.own_config:
        raise ValueError(
            f"Transformers has no class for {to} to compare logits with; pass verify=False (--no-verify)."
        )
    report = convert(
        source,
        exported,
        [*parts, *copies],
        dst,
        counts=count_parameters(list(outputs.values()), config),
        max_shard_size=max_shard_size,
        dry_run=dry_run,
        check=verify,
        progress=progress,
    )
    return report | {"to": to, "layout": layout, "training_fields": training_fields}


def family_config(family: Family, config: HfMoeConfig) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The family's config that computes what `config` computes, and the training fields that it has no place for.

    The table is read backwards and then forwards again; where that does not give `config`, the family cannot hold it.
    """
    exported, unheld = nearest(family, config)
    # A field that is always read says more than one that is read because of another.
    needed = sorted((name for name in unheld if name not in TRAINING_FIELDS), key=lambda name: name in READ_IF)
    if needed:
        others = [other for other in FAMILIES if holds(FAMILIES[other], config)]
        hint = f"{' and '.join(others)} can" if others else "none that hf_moe writes can"
        value = reprlib.repr(unheld[needed[0]])
        raise ValueError(f"{family.model_type} cannot hold this model's {needed[0]}={value}; {hint}.")
    return exported, unheld


def nearest(family: Family, config: HfMoeConfig) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The family's config nearest to `config`, and the fields of `config` that it does not say."""
    what = f"{family.model_type} cannot hold this model"
    exported = built(family.config_class, what, **family.family_fields(respelled(config)))
    again = built(HfMoeConfig, what, **family.hf_moe_fields(exported))
    exported.architectures = [family.architecture]
    ours, theirs = computation(config), computation(again)
    names = [name for name in HfMoeConfig.__annotations__ if name in ours or name in theirs]
    return exported, {name: getattr(config, name) for name in names if not equal(ours.get(name), theirs.get(name))}


def holds(family: Family, config: HfMoeConfig) -> bool:
    try:
        return not set(nearest(family, config)[1]) - TRAINING_FIELDS
    except ValueError:
        return False


def equal(a: Any, b: Any) -> bool:
    numbers = isinstance(a, float) and isinstance(b, (int, float))
    return math.isclose(a, b, rel_tol=1e-9) if numbers else a == b  # a coefficient times K, divided by K


def split(output: Output, family: Family, rows: Rows, config: HfMoeConfig) -> list[Output]:
    """The family's tensors whose rows, one after the other, are those of `output`."""
    names = family.sources(output.name, rows, config)
    if not any(EXPERT in name for name in family.row(output.name, rows, config)):
        (name,) = names
        return [output._replace(name=name)]
    shape = (math.prod(output.shape[:-1]) // len(names), output.shape[-1])

    def piece(index: int) -> Iterator[torch.Tensor]:
        (whole,) = output.pieces()  # a view of the file
        yield whole.reshape(len(names), *shape)[index]

    return [Output(name, output.dtype, shape, lambda index=index: piece(index)) for index, name in enumerate(names)]
