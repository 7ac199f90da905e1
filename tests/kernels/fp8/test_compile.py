"""The FP8 kernels compile for a card that is not here."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hf_moe.kernels.tiles import SHARED_MEMORY

ROOT = Path(__file__).resolve().parents[3]
KERNELS = {"tiles", "blocks", "up", "product", "activation_backward", "weight_gradient"}


def test_kernels_compile_and_fit_into_shared_memory():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error:TRITON_DEFAULT_FP_FUSION", "-m", "tests.kernels.fp8.compile_worker"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    memory = json.loads(done.stdout.splitlines()[-1])
    assert {name.split(".")[1].removesuffix("_kernel") for name in memory} >= KERNELS
    assert max(memory.values()) <= SHARED_MEMORY
