"""A conversion in a process of its own, which SIGKILL ends before a given line of hf_moe's conversion code."""

import os
import signal
import sys
from pathlib import Path

import hf_moe.conversion
from hf_moe.conversion.files import writer

from hf_moe import staging

# Compiled code says its file as it was imported.
CODE = (str(Path(hf_moe.conversion.__file__).parent), staging.__file__)


def convert(function: str, arguments: dict, kill_at: int | None, counts: Path | None = None) -> None:
    """Call `hf_moe.conversion.<function>`, killed before the line `kill_at`.

    `counts` receives the lines before the first trace on the disk, and all lines.
    """
    writer.CHUNK_BYTES = 1000  # several writes to a tensor
    lines, before = 0, None

    def trace(frame, event, argument):
        nonlocal lines, before
        if not frame.f_code.co_filename.startswith(CODE):
            return None
        if event == "line":
            lines += 1
            if before is None and frame.f_code is staging.resumable.__wrapped__.__code__:
                before = lines
            if lines == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    getattr(hf_moe.conversion, function)(**arguments)
    sys.settrace(None)
    if counts is not None:
        counts.write_text(f"{before} {lines}")
