"""Writing a converted model: weights, config, remote code and the files that go along, in one atomic step."""

import math
import shutil
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save

from ..model.configuration_hf_moe import HfMoeConfig
from ..model.modeling_hf_moe import HfMoeForCausalLM
from ..version import __version__
from .hashing import Hashing
from .source import Source
from .tokenizer import keep_class, load_tokenizer
from .verify import verify
from .writer import Output, check_destination, check_space, plan_shards, staged, write_shards


def convert(
    source: Source,
    config: PreTrainedConfig,
    outputs: list[Output],
    dst: str | Path,
    *,
    counts: dict[str, int],
    provenance: dict[str, Any] | None = None,
    max_shard_size: int | str,
    dry_run: bool,
    check: bool,
    progress: bool,
) -> dict[str, Any]:
    """Write the model that `outputs` and `config` describe to `dst`, and report on it.

    `counts` go into the report. With `provenance` (what was done, with which arguments) the model is an hf_moe one: it
    is completed with where the source came from, and the model's code goes along. Another family's has neither.
    """
    dst = check_destination(Path(dst))
    if check and not dry_run and source.incomparable:
        raise ValueError(f"{source.incomparable}; pass verify=False (--no-verify).")
    shards = plan_shards(outputs, max_shard_size)
    nbytes = sum(shard.nbytes for shard in shards)
    report = {
        "output": str(dst),
        "source": source.name,
        "model_type": source.family.model_type,
        **counts,
        "dtype": str(source.checkpoint.dtype).removeprefix("torch."),
        "disk_bytes": nbytes,
        "shards": len(shards),
        "carried_files": [str(path) for path in source.carried_files()],
        "ignored_config_keys": source.ignored_config_keys,
        "dry_run": dry_run,
    }
    if dry_run:
        return report
    check_space(dst, nbytes)
    tokenizer = load_tokenizer(source.checkpoint.folder)
    with staged(dst) as folder:
        bar = tqdm(total=nbytes, unit="B", unit_scale=True, desc=dst.name, disable=not progress)
        if provenance is None:
            with bar:
                write_shards(folder, shards, bar.update)
        else:
            with Hashing(source.checkpoint) as hashing, bar:
                write_shards(folder, shards, bar.update)
                origin = {"source": source.name, "model_type": source.family.model_type, "revision": source.revision}
                config.provenance = provenance | origin | {"sha256": hashing.digests(), "hf_moe_version": __version__}
            config.architectures = [HfMoeForCausalLM.__name__]
        config.dtype = source.config.dtype or source.checkpoint.dtype
        config.save_pretrained(folder)
        if provenance is not None:
            custom_object_save(HfMoeForCausalLM, folder)  # its module and what that imports
        for path in source.carried_files():
            (folder / path).parent.mkdir(exist_ok=True)
            shutil.copyfile(source.checkpoint.folder / path, folder / path)
        if tokenizer is not None:
            keep_class(tokenizer, folder)
    if check:
        report |= verify(source.checkpoint.folder, dst)
    return report


def count_parameters(outputs: list[Output], config: HfMoeConfig) -> dict[str, int]:
    """All parameters, and those that one token meets: K of E routed experts, everything else whole."""
    total = active = 0
    for output in outputs:
        if output.name.endswith("e_score_correction_bias"):
            continue  # a buffer, moved by balancing
        size = math.prod(output.shape)
        total += size
        routed = ".mlp.experts." in output.name
        active += size // config.num_experts * config.num_experts_per_tok if routed else size
    return {"total_params": total, "active_params": active}
