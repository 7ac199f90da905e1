"""Tests in several processes: how they are started, and how one of them ends."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


def on_two_processes(script: str, *words: str) -> Any:
    """Run a script of tests/ by torchrun on two CPU processes; returns the JSON in its last line."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(ROOT / "tests" / script), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def leave() -> None:
    """End it without what Python and libraries do at exit, and once the others are here.

    There a thread of gloo that still holds a tensor may abort the process, its work done (pytorch#179291).
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
