"""A released mixture of experts to hf_moe: `import_checkpoint`."""

from pathlib import Path
from typing import Any

from ..staging import check_destination
from .families import IMPORTED
from .files.source import open_source
from .options import ImportOptions, takes
from .output import convert


@takes(ImportOptions)
def import_checkpoint(src: str | Path, dst: str | Path, options: ImportOptions) -> dict[str, Any]:
    """Turn a checkpoint of one of `IMPORTED` into an hf_moe checkpoint with the same weights, bit for bit.

    Block-FP8 and MXFP4 weights become the bfloat16 ones that they stand for.

    src: a folder with safetensors weights, experts fused or one by one, or a Hub id. dst: a folder that does not exist
    or is empty. Keywords: the fields of ImportOptions.

    Returns a report that can be written as JSON: total_params, active_params, disk_bytes, output and, from `verify`,
    max_abs_diff and its companions. Raises ValueError or OSError of one line; then there is no output.
    """
    check_destination(Path(dst), options.resume)
    source = open_source(src, IMPORTED, options.drop_mtp)
    config = source.hf_moe_config()
    outputs = list(source.outputs(config).values())
    return convert(source, config, outputs, dst, options, provenance={"method": "import"})
