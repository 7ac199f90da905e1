"""A released mixture of experts to hf_moe: `import_checkpoint`."""

from pathlib import Path
from typing import Any

from .families import FAMILIES
from .output import convert
from .source import open_source
from .writer import check_destination


def import_checkpoint(
    src: str | Path,
    dst: str | Path,
    *,
    max_shard_size: int | str = "5GB",
    dry_run: bool = False,
    verify: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Turn a checkpoint of one of `FAMILIES` into an hf_moe checkpoint with the same weights, bit for bit.

    src: a folder with safetensors weights, experts fused or one by one, or a Hub id. dst: a folder that does not exist
    or is empty. dry_run: plan and report, write nothing. verify: compare the logits with Transformers' own class.

    Returns a report that can be written as JSON: total_params, active_params, disk_bytes, output and, from `verify`,
    max_abs_diff and its companions. Raises ValueError or OSError of one line; then there is no output.
    """
    check_destination(Path(dst))
    source = open_source(src, FAMILIES)
    config = source.hf_moe_config()
    return convert(
        source,
        config,
        list(source.outputs(config).values()),
        dst,
        provenance={"method": "import"},
        max_shard_size=max_shard_size,
        dry_run=dry_run,
        check=verify,
        progress=progress,
    )
