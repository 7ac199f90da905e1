"""A saved model made one in block FP8, as DeepSeek-V3 is released (https://arxiv.org/abs/2412.19437, 3.3.2).

Matrices of attention, MLPs and experts become codes, each beside its `_scale_inv`, and the configuration says so.
Embeddings, head, norms and routers stay in bfloat16. So do matrices whose last block would not be whole, of which
Transformers 5.24 takes all blocks for smaller ones. Shard by shard: the model is never in memory.
"""

import json
from pathlib import Path
from typing import Any

import torch
from hf_moe.conversion.files.block_fp8 import SCALE
from safetensors.torch import load_file, save_file

from hf_moe.hub.folder import INDEX
from hf_moe.kernels.fp8.format import BLOCK, blocks_of
from hf_moe.staging import written_aside

from ..weights.groups import MATRIX_PARTS, part_of

QUANTIZATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}


def is_stored(name: str, tensor: torch.Tensor) -> bool:
    """Whether a tensor of a file becomes codes: a matrix that something is multiplied by, but for routers and head."""
    expert = ".experts." in name  # of every family, whatever stands before
    matrix = name.endswith(".weight") and tensor.dim() == 2 and min(tensor.shape) > 1
    even = all(size % BLOCK == 0 or size < BLOCK for size in tensor.shape)
    return matrix and even and (expert or part_of(name) in MATRIX_PARTS)


def to_blocks(folder: str | Path) -> None:
    """The model in `folder`, of one file or several, in block FP8."""
    folder, weight_map, kept = Path(folder), {}, set()
    for path in sorted(folder.glob("*.safetensors")):
        tensors = {}
        for name, tensor in load_file(path).items():
            if is_stored(name, tensor):
                codes, scales = blocks_of(tensor)
                tensors |= {name: codes[0], name + SCALE: scales[0]}
            else:
                tensors[name] = tensor
                if tensor.dim() == 2:
                    kept.add(name.removesuffix(".weight"))
        with written_aside(path) as aside:
            save_file(tensors, aside, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, path.name)
    if (folder / INDEX).is_file():
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        write(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = QUANTIZATION | {"modules_to_not_convert": sorted(kept)}
    write(folder / "config.json", config | {"quantization_config": quantization})


def write(path: Path, facts: dict[str, Any]) -> None:
    with written_aside(path) as aside:
        aside.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
