"""A mixture of any family that hf_moe reads, seen by hf_moe's names, and one with other experts written in its family.

Nothing is held but what is being written. Shapes: E routed experts, V vocabulary, K experts per token.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from ...model.configuration_hf_moe import HfMoeConfig
from ...reading import built
from ..computation import TRAINING_FIELDS
from ..export_checkpoint import HF_MOE, rearranged
from ..families import IMPORTED
from ..files.source import Source, open_source
from ..files.text_part import TextCheckpoint
from ..files.writer import Output
from ..nearest_families import fits
from ..options import ConversionOptions
from ..output import Domain, convert

FAMILIES = {HF_MOE.model_type: HF_MOE, **IMPORTED}
LAYER = re.compile(r"model\.(?:mtp_)?layers\.\d+(?=\.)")
ROWS = ("weight", "bias", "noise_weight", "e_score_correction_bias")  # of a router, one for each expert
OTHERS = ("baseline_weight", "hash_table", "l1_coef", "null_weight", "null_bias")


class Expert(NamedTuple):
    """Where an expert of the new model is from: number `expert` of the layer of that name in `mixture`."""

    mixture: "Mixture"
    expert: int

    @property
    def experts(self) -> tuple[int, ...]:
        return (self.expert,)

    def tensor(self, name: str) -> torch.Tensor:
        """What the expert has of the tensor `name`."""
        return self.mixture.expert(name, self.expert)


@dataclass(frozen=True)
class Mixture:
    """A checkpoint, its hf_moe config and its tensors by hf_moe's names."""

    source: Source
    config: HfMoeConfig
    outputs: dict[str, Output]

    @property
    def layers(self) -> list[str]:
        """The names of the layers that have routed experts."""
        return list(dict.fromkeys(LAYER.match(name)[0] for name, x in self.outputs.items() if self.per_expert(x)))

    def per_expert(self, output: Output) -> bool:
        """Whether the tensor has rows of each expert, one expert's after another's."""
        found = re.search(r"\.(experts|gate)\.(\w+)$", output.name)
        if found is None or found[2] in OTHERS:
            return False
        return found[1] == "experts" or found[2] in ROWS or output.shape[:1] == (self.config.num_experts,)

    def expert(self, name: str, expert: int) -> torch.Tensor:
        """One expert's share of a tensor."""
        output = self.outputs[name]
        return output.part(expert, self.config.num_experts).reshape(output.shape[1:])


def open_mixture(src: str | Path) -> Mixture:
    """Raises FileNotFoundError or a ValueError of one line where there is none whose experts can be changed."""
    source = open_source(src, FAMILIES)
    config = source.hf_moe_config()
    if "sparse" not in config.mlp_layer_types:
        raise ValueError(f"{source.name} is dense: it has no experts to change.")
    if config.attention_type == "moa":
        raise ValueError(f"{source.name} has experts in its attention, too, which cannot be changed yet.")
    if isinstance(source.checkpoint, TextCheckpoint):
        raise ValueError(f"{source.name} reads pictures: import its text (hf-moe import), and change that.")
    return Mixture(source, config, source.outputs(config))


def changed(config: HfMoeConfig, name: str, **fields: Any) -> HfMoeConfig:
    """The config with other fields. Raises ValueError in the words of the config where they do not go together."""
    new = deepcopy(config)
    for field, value in fields.items():
        setattr(new, field, value)
    built(new.validate, f"{name} cannot be so")
    return new


def in_family(mixture: Mixture, config: HfMoeConfig) -> PreTrainedConfig:
    """The config of the mixture's own family that computes what `config` computes; all else as it was said.

    Raises a ValueError that names what the family cannot hold, and the families that can.
    """
    family, said = mixture.source.family, deepcopy(mixture.source.config)
    before, after = (family.family_fields(x) for x in (mixture.config, config))
    for field, value in after.items():
        if before.get(field) != value:
            setattr(said, field, value)
    if getattr(said, "quantization_config", None) is not None:  # what is written are the values it stands for
        del said.quantization_config
    what = f"{family.model_type} cannot hold the result"
    again = built(HfMoeConfig, what, **built(family.hf_moe_fields, what, said))
    for field in HfMoeConfig.__annotations__:
        if field not in TRAINING_FIELDS and getattr(again, field) != getattr(config, field):
            others = [fit["family"] for fit in fits(config) if fit["holds"]]
            raise ValueError(
                f"{family.model_type} cannot hold the result's {field}={getattr(config, field)!r}; "
                f"{', '.join(['hf_moe', *others])} can: hf-moe import the model first."
            )
    return said


def with_experts(
    mixture: Mixture,
    experts: Mapping[str, Sequence[Expert]],
    rows: Callable[[str, int, torch.Tensor], torch.Tensor] = lambda name, number, row: row,
    top_k: int | None = None,
) -> dict[str, Output]:
    """The tensors of the mixture with these experts in each layer, and with whatever `rows` makes of router rows.

    A hash router's table follows: a token keeps the experts that are left, and gets others in the place of the rest.
    """

    def piece(name: str, layer: Sequence[Expert], number: int) -> torch.Tensor:
        found = layer[number].tensor(name)
        return rows(name, number, found) if ".gate." in name else found

    def read(name: str, layer: Sequence[Expert], index: int, count: int) -> torch.Tensor:
        if count % len(layer) == 0:
            each = count // len(layer)
            return piece(name, layer, index // each).reshape(each, -1)[index % each]
        return torch.cat([piece(name, layer, i).reshape(-1) for i in range(len(layer))]).view(count, -1)[index]

    made = {}
    for name, output in mixture.outputs.items():
        found = LAYER.match(name)
        layer = experts.get(found[0]) if found else None
        if layer is None or not (mixture.per_expert(output) or name.endswith(".hash_table")):
            made[name] = output
        elif name.endswith(".hash_table"):
            kept = [x.experts[0] for x in layer]
            table = partial(rehashed, output, kept, top_k or output.shape[1])
            shape = (output.shape[0], top_k or output.shape[1])
            made[name] = Output(name, output.dtype, shape, lambda table=table: [table()], output.nbytes)
        else:
            others = {id(x.mixture): x.mixture.outputs[name] for x in layer}.values()
            for other in others:
                if other.dtype != output.dtype or other.shape[1:] != output.shape[1:]:
                    raise ValueError(
                        f"{name} is {list(other.shape)} of {other.dtype} in one model and {list(output.shape)} of "
                        f"{output.dtype} in the other: their experts cannot stand beside each other."
                    )
            shape = (len(layer), *output.shape[1:])
            pieces = partial(map, partial(piece, name, layer), range(len(layer)))
            held = max(torch.Size(shape[1:]).numel() * output.dtype.itemsize, *(x.held for x in others), 0)
            made[name] = Output(name, output.dtype, shape, pieces, held, partial(read, name, layer))
    return made


def rehashed(output: Output, kept: Sequence[int], top_k: int) -> torch.Tensor:
    """A hash table [V, K] over the experts `kept`, by their new numbers: each token's that are left, then others."""
    (table,) = output.pieces()
    number = {expert: new for new, expert in reversed(list(enumerate(kept)))}
    new = torch.empty(len(table), top_k, dtype=output.dtype)
    for token, experts in enumerate(table.tolist()):
        left = [number[x] for x in experts if x in number][:top_k]
        others = ((token + i) % len(kept) for i in range(len(kept)))
        left += [x for x in others if x not in left][: top_k - len(left)]
        new[token] = torch.tensor(left)
    return new


def write(
    mixture: Mixture,
    config: HfMoeConfig,
    outputs: dict[str, Output],
    dst: str | Path,
    options: ConversionOptions,
    provenance: dict[str, Any],
    domains: Sequence[Domain] = (),
    measure: Callable[[Path], dict[str, Any]] | None = None,
    memory: int = 0,
) -> dict[str, Any]:
    """Write the model in the mixture's own family; returns `convert`'s report. The last three are as there."""
    family, source = mixture.source.family, mixture.source
    said = in_family(mixture, config)
    parts = list(outputs.values())
    if family is not HF_MOE:
        shapes = {x.name: x.shape for x in mixture.outputs.values()}
        layout = family.layout_of(shapes, source.checkpoint.entries, mixture.config)
        regions = family.regions({x.name: x.shape for x in parts}, layout, config)
        copies = family.copies(config).items()
        parts = rearranged(outputs, regions)
        parts += [outputs[name]._replace(name=copy) for copy, name in copies if name in outputs]
    return convert(
        source,
        config,
        parts,
        dst,
        options,
        provenance=provenance,
        exported=None if family is HF_MOE else said,
        memory=memory,
        domains=domains,
        measure=measure,
    )
