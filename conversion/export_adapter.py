"""A LoRA adapter of an hf_moe model to a released family's names: one matrix for each expert, as servers read them.

PEFT keeps the adapter of E experts' fused tensor [E, out, in] as two matrices: A [E r, in], expert after expert, and
B [out, r E], whose column j E + e is the j-th of expert e. So each expert has an adapter of its own, and so have the
rows of its fused tensor that a family stores by themselves: with the same A, and their rows of B.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..chat import write_plain_templates
from ..model.configuration_hf_moe import HfMoeConfig
from ..model.modeling_hf_moe import HfMoeForCausalLM
from ..staging import check_destination, staged
from .families import FAMILIES, Family
from .families.regions import Region
from .files.checkpoint import read_json
from .files.source import CARRIED_FILES, Source, tensor_shapes
from .nearest_families import family_config

CONFIG, WEIGHTS, BIASES = "adapter_config.json", "adapter_model.safetensors", "router_bias.safetensors"
PREFIX = "base_model.model."
# Fields of an adapter's config that say nothing about its weights as long as they are empty.
EMPTY = ("use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern")
EMPTY += ("trainable_token_indices", "layer_replication", "use_bdlora", "use_qalora")


class Pair(NamedTuple):
    """The adapter of one matrix: b @ a, times lora_alpha / r, is added to it; a [r, in], b [out, r]."""

    a: torch.Tensor
    b: torch.Tensor


def export_adapter(
    src: str | Path,
    dst: str | Path,
    *,
    to: str,
    open_base: Callable[[str], tuple[Source, HfMoeConfig]],
    exported_base: str | None,
    dry_run: bool,
) -> dict[str, Any]:
    """Write the LoRA adapter in the folder `src`, of an hf_moe model, for its base exported to the family `to`.

    Bit for bit, in the names that vLLM and SGLang read. `open_base` opens the base; `exported_base`, a folder or Hub
    id, is what the adapter calls its own. Returns a report that can be written as JSON. Raises a ValueError or OSError
    of one line where the family or the names have no place for something; then there is no output.
    """
    src, dst = Path(src), check_destination(Path(dst))
    said = read_json(src / CONFIG)
    instead = f"export the whole model instead: {merged(src)}."
    if said.get("peft_type") != "LORA" or said.get("bias", "none") != "none":
        raise ValueError(f"{src} is no LoRA adapter of matrices alone, which servers read; {instead}")
    for name in EMPTY:
        if said.get(name):
            raise ValueError(f"{src} has {name}={said[name]!r}, which no server reads with experts; {instead}")
    family = FAMILIES[to]
    check_exported(exported_base, family)
    layout = per_expert_layout(family, instead)
    source, config = open_base(said["base_model_name_or_path"])
    check_biases(src, source, instead)
    family_config(family, config)  # raises where the family does not hold the base
    found = read_pairs(src, said, config)
    shapes = {name: shape for name, shape in tensor_shapes(config).items() if name in found}
    regions = family.regions(shapes, layout, config)
    tensors, modules = {}, set()
    for name, pair in by_matrix(found, regions, to, instead).items():
        module = name.removesuffix(".weight")
        modules.add(module.rpartition(".")[2])
        tensors[f"{PREFIX}{module}.lora_A.weight"] = pair.a.clone()
        tensors[f"{PREFIX}{module}.lora_B.weight"] = pair.b
    report = {
        "output": str(dst),
        "source": src.name,
        "base": str(said["base_model_name_or_path"]),
        "to": to,
        "matrices": len(tensors) // 2,
        "disk_bytes": sum(x.nbytes for x in tensors.values()),
        "dry_run": dry_run,
    }
    if exported_base is None:
        report["warning"] = (
            f"{CONFIG} names no base, for that is the exported one: say --exported-base FOLDER_OR_HUB_ID, or load it "
            f"by PeftModel.from_pretrained(base, {str(dst)!r})."
        )
    if dry_run:
        return report
    said |= {"target_modules": sorted(modules), "target_parameters": None}
    said["base_model_name_or_path"] = exported_base
    with staged(dst) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        for path in sorted(path for pattern in CARRIED_FILES for path in src.glob(pattern) if path.is_file()):
            target = folder / path.relative_to(src)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        write_plain_templates(folder)
        (folder / CONFIG).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return report


def is_adapter(src: str | Path) -> bool:
    return (Path(src) / CONFIG).is_file() and not (Path(src) / "config.json").is_file()


def merged(src: Path) -> str:
    """How to come by the whole model of an adapter."""
    if (src / "merged" / "config.json").is_file():
        return str(src / "merged")
    return f"train with --lora_merge float32, which writes {src / 'merged'}"


def check_exported(base: str | None, family: Family) -> None:
    """Raises ValueError for a folder that holds no model of the family; a Hub id is taken as it is."""
    if base is None or not Path(base).is_dir():
        return
    found = read_json(Path(base) / "config.json").get("model_type")
    if found != family.model_type:
        raise ValueError(
            f"--exported-base {base} is a model of {found}, but the adapter becomes one of {family.model_type}: give "
            f"what hf-moe export {base} DST --to {family.model_type} writes."
        )


def per_expert_layout(family: Family, instead: str) -> str:
    if "per-expert" in family.layouts:
        return "per-expert"
    able = ", ".join(name for name, other in FAMILIES.items() if "per-expert" in other.layouts)
    raise ValueError(
        f"{family.model_type} stores all experts in one tensor, for which servers read no adapter; one can be "
        f"exported to {able}, or {instead}"
    )


def check_biases(src: Path, source: Source, instead: str) -> None:
    """Raises ValueError where selection biases moved while the adapter was trained: it has no place for them."""
    if not (src / BIASES).is_file():
        return
    with safe_open(src / BIASES, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (no dict)
            if not torch.equal(file.get_tensor(name), source.checkpoint.tensor(name).float()):
                raise ValueError(f"{src} moved {name} of its base, which no adapter of a server holds; {instead}")


def read_pairs(src: Path, said: dict[str, Any], config: HfMoeConfig) -> dict[str, list[Pair]]:
    """Name of a weight of the hf_moe model -> its adapter, or that of each of its experts."""
    from peft import LoraConfig, get_peft_model

    from ..training.host_trl import quiet
    from ..training.weights.adapters import adapted_weights

    shapes = tensor_shapes(config)
    with torch.device("meta"), quiet():
        model = get_peft_model(HfMoeForCausalLM(config), LoraConfig(**said))
    layers = {layer: weight for weight, layer in adapted_weights(model).items()}
    found = {}
    with safe_open(src / WEIGHTS, framework="pt") as file:
        unread = set(file.keys())
        for name, layer in model.named_modules():
            if layer not in layers:
                continue
            keys = [f"{name}.lora_{part}.weight" for part in "AB"]
            if lacking := [key for key in keys if key not in unread]:
                raise ValueError(f"{src / WEIGHTS} lacks {lacking[0]}, which {CONFIG} calls for.")
            unread -= set(keys)
            a, b = map(file.get_tensor, keys)
            shape = shapes[layers[layer]]
            experts = shape[0] if len(shape) == 3 else 1
            found[layers[layer]] = [Pair(part, b[:, e::experts]) for e, part in enumerate(a.chunk(experts))]
    if unread:
        raise ValueError(f"{src / WEIGHTS} holds {min(unread)}, which {CONFIG} does not call for.")
    return found


def by_matrix(
    found: Mapping[str, list[Pair]], regions: Mapping[str, list[Region]], to: str, instead: str
) -> dict[str, Pair]:
    """Name of a matrix of the family -> its adapter. Raises ValueError where one holds more than an adapter's rows."""
    made, filled = {}, {}
    for weight, pairs in found.items():
        parts = len(regions[weight]) // len(pairs)
        for index, region in enumerate(regions[weight]):
            pair, rows = pairs[index // parts], pairs[index // parts].b.chunk(parts)[index % parts]
            mine = made.setdefault(region.name, Pair(pair.a, rows.new_empty(region.block_shape[0], rows.shape[1])))
            if mine.a is not pair.a or region.blocks != 1 or region.transposed:
                raise ValueError(f"{to} keeps {weight} within {region.name}, beside others, so {instead}")
            mine.b[region.rows] = rows
            filled[region.name] = filled.get(region.name, 0) + len(rows)
    partly = [name for name, rows in filled.items() if rows < len(made[name].b)]
    if partly:
        raise ValueError(f"{to} keeps more in {partly[0]} than the adapter reaches, so {instead}")
    return made
