"""A model with Liger's norms on two processes under FSDP2, which gives modules classes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_sharded_norms_are_those_of_one_process():
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(root / "tests/kernels/sharded_liger_worker.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    differences = json.loads(result.stdout.splitlines()[-1])
    assert set(differences) == {"Llama's norms", "Gemma's norms"} and max(differences.values()) < 1e-5
