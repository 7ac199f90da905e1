"""An hf_moe checkpoint to a released family: `export_checkpoint`."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..model.configuration_hf_moe import HfMoeConfig
from ..staging import check_destination
from .export_adapter import export_adapter, is_adapter
from .families import ENCODER_DECODERS, FAMILIES, Family
from .families.family import same
from .families.regions import Region
from .files.source import Source, open_source
from .files.writer import Output
from .nearest_families import family_config, fits
from .options import ExportOptions, takes
from .output import convert

# What an hf_moe checkpoint is read by: every field and every tensor under its own name.
HF_MOE = Family(HfMoeConfig.model_type, fields=same(*HfMoeConfig.__annotations__))


@takes(ExportOptions)
def export_checkpoint(src: str | Path, dst: str | Path, options: ExportOptions) -> dict[str, Any]:
    """Turn an hf_moe checkpoint into one of a family of `FAMILIES`, with the same weights, bit for bit.

    src: a folder with an hf_moe checkpoint, or a Hub id; or a folder with a LoRA adapter of one, which becomes an
    adapter of the exported base, expert by expert. dst: a folder that does not exist or is empty. Keywords: the fields
    of ExportOptions.

    Returns a report that can be written as JSON: total_params, active_params, disk_bytes, output, training_fields
    (those that only training reads and the family has no place for) and, from `verify`, max_abs_diff and its
    companions. Raises a ValueError that names what the family cannot hold, or an OSError; then there is no output.
    """
    check_destination(Path(dst), options.resume)
    family, layout = chosen(options)
    if is_adapter(src):
        open_base = partial(open_hf_moe, drop_mtp=options.drop_mtp)
        base = options.exported_base
        return export_adapter(
            src, dst, to=options.to, open_base=open_base, exported_base=base, dry_run=options.dry_run
        )
    if options.exported_base is not None:
        raise ValueError(f"--exported-base is for an adapter, but {src} is a whole model: leave it out.")
    source, config = open_hf_moe(src, options.drop_mtp)
    exported, training_fields = family_config(family, config)
    outputs = source.outputs(config)
    parts = rearranged(outputs, family.regions({x.name: x.shape for x in outputs.values()}, layout, config))
    copies = [outputs[name]._replace(name=copy) for copy, name in family.copies(config).items() if name in outputs]
    if options.verify and not options.dry_run and family.own_config:
        raise ValueError(
            f"Transformers has no class for {options.to} to compare logits with; pass verify=False (--no-verify)."
        )
    report = convert(
        source,
        config,
        [*parts, *copies],
        dst,
        replace(options, verify=options.verify and not family.own_config),
        provenance={"method": "export", "to": options.to, "layout": layout},
        exported=exported,
    )
    return report | {"to": options.to, "layout": layout, "training_fields": training_fields}


def chosen(options: ExportOptions) -> tuple[Family, str]:
    """The family, and its layout. Raises ValueError where it is none, or has no such layout."""
    to = options.to
    if to in ENCODER_DECODERS:
        raise ValueError(f"to={to!r} is an encoder-decoder: it cannot hold a decoder, which hf_moe's models are.")
    if to not in FAMILIES:
        raise ValueError(f"to={to!r} is no family that hf_moe writes; it writes {', '.join(FAMILIES)}.")
    family = FAMILIES[to]
    layout = options.layout or next(iter(family.layouts))
    if layout not in family.layouts:
        raise ValueError(f"layout {layout!r} is unknown to {to}; it can be {' or '.join(family.layouts)}.")
    return family, layout


def nearest_families(src: str | Path, *, drop_mtp: bool = False) -> dict[str, Any]:
    """Which of `FAMILIES` can hold the hf_moe checkpoint `src`, and what keeps the others from it.

    Returns `source` and `nearest`, a list of one dict a family, those that can first and then by how much is in the
    way: family, holds, and of what comes first field, value and reason. Raises a ValueError or OSError of one line.
    """
    source, config = open_hf_moe(src, drop_mtp)
    return {"source": source.name, "nearest": fits(config)}


def open_hf_moe(src: str | Path, drop_mtp: bool) -> tuple[Source, HfMoeConfig]:
    """An hf_moe checkpoint and its config, without multi-token prediction if `drop_mtp`."""
    ignored = (r"model\.mtp_layers\..+",) if drop_mtp else ()
    source = open_source(src, {HF_MOE.model_type: replace(HF_MOE, ignored_tensors=ignored)})
    config = source.hf_moe_config()
    if drop_mtp:
        config.num_mtp_layers = 0
    return source, config


class Place(NamedTuple):
    """What belongs into a region: part `index` of `count` equal ones of an hf_moe tensor."""

    region: Region
    output: Output
    index: int
    count: int

    def read(self) -> torch.Tensor:
        return self.output.part(self.index, self.count)  # a view of the file where it lies there as it is


def rearranged(outputs: dict[str, Output], regions: dict[str, list[Region]]) -> list[Output]:
    """The family's tensors, in which the hf_moe tensors `outputs` lie in `regions`.

    Raises a ValueError that names one which has no place there and is not 0, or has one for experts that differ.
    """
    blocks: dict[str, dict[int, list[Place]]] = {}
    for target, parts in regions.items():
        if not parts and any(piece.any() for piece in outputs[target].pieces()):
            raise ValueError(f"{target} is not 0, but the family has no place for it.")
        for index, region in enumerate(parts):
            place = Place(region, outputs[target], index, len(parts))
            held = blocks.setdefault(region.name, {}).setdefault(region.block, [])
            same = [other for other in held if other.region.rows == region.rows]
            if not same:
                held.append(place)
            elif not torch.equal(place.read(), same[0].read()):
                raise ValueError(f"{target} differs between experts, which have one {region.name} in the family.")
    return [rearranged_tensor(name, list(found.values())) for name, found in blocks.items()]


def rearranged_tensor(name: str, blocks: list[list[Place]]) -> Output:
    first = blocks[0][0]
    for place in blocks[0]:
        if place.output.dtype != first.output.dtype:
            raise ValueError(
                f"{place.output.name} is {place.output.dtype}, but {first.output.name} is {first.output.dtype}; they "
                f"become one tensor, {name}."
            )
    dtype, region = first.output.dtype, first.region
    held = 0 if is_view(blocks[0]) else math.prod(region.block_shape) * dtype.itemsize
    return Output(name, dtype, region.shape, lambda: map(filled, blocks), held)


def is_view(places: list[Place]) -> bool:
    """Whether a block is a part of the file as it lies there."""
    return len(places) == 1 and places[0].region.is_block


def filled(places: list[Place]) -> torch.Tensor:
    """One block: a view of the file where that will do."""
    if is_view(places):
        return places[0].read()
    block = torch.empty(places[0].region.block_shape, dtype=places[0].output.dtype)
    for place in places:
        region = place.region.of(block)
        region.copy_(place.read().view(region.shape))
    return block
