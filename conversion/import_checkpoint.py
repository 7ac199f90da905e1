"""A released mixture of experts to hf_moe: `import_checkpoint`."""

from pathlib import Path
from typing import Any

from ..staging import check_destination
from .families import FAMILIES
from .files.source import open_source
from .output import convert


def import_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    drop_mtp: bool = False,
    max_shard_size: int | str = "5GB",
    dry_run: bool = False,
    resume: bool = False,
    verify: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Turn a checkpoint of one of `FAMILIES` into an hf_moe checkpoint with the same weights, bit for bit.

    Block-FP8 and MXFP4 weights become the bfloat16 ones that they stand for.

    src: a folder with safetensors weights, experts fused or one by one, or a Hub id. dst: a folder that does not exist
    or is empty. drop_mtp: leave out DeepSeek-V3's layers for multi-token prediction. dry_run: plan and report, write
    nothing. verify: compare the logits with Transformers' own class; refused where that cannot compute them.

    Returns a report that can be written as JSON: total_params, active_params, disk_bytes, output and, from `verify`,
    max_abs_diff and its companions. Raises ValueError or OSError of one line; then there is no output.
    """
    check_destination(Path(dst), resume)
    source = open_source(src, FAMILIES, drop_mtp)
    config = source.hf_moe_config()
    outputs = list(source.outputs(config).values())
    return convert(
        source,
        config,
        outputs,
        dst,
        provenance={"method": "import"},
        max_shard_size=max_shard_size,
        dry_run=dry_run,
        resume=resume,
        check=verify,
        progress=progress,
    )
