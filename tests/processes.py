"""Tests in several processes: how they are started, and how one of them ends."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


ANSWER = "HF_MOE_TESTS_ANSWER"


def on_two_processes(script: str, *words: str) -> Any:
    """Run a script of tests/ by torchrun on two CPU processes; returns what it left with."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with tempfile.TemporaryDirectory() as folder:
        # A file, not their common output: there the lines of two processes run into each other.
        answer = Path(folder) / "answer.json"
        mine = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path, ANSWER: str(answer)}
        result = subprocess.run(
            [*command, str(ROOT / "tests" / script), *words], env=os.environ | mine, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr[-3000:]
        return json.loads(answer.read_text())


def leave(answer: Any = None) -> None:
    """End it, once the others are here, with the first one's answer, without what Python and libraries do at exit.

    There a thread of gloo that still holds a tensor may abort the process, its work done (pytorch#179291).
    """
    if ANSWER in os.environ and torch.distributed.get_rank() == 0:
        Path(os.environ[ANSWER]).write_text(json.dumps(answer))
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
