"""Running commands in this process, and the checkpoints that they work on."""

from typing import NamedTuple

import pytest
import torch
from hf_moe.conversion import upcycle
from hf_moe_cli import main

from hf_moe.demo import DEMO_MODEL


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def command(capfd):
    """Run `hf-moe` with these words; what it wrote is read from the file descriptors, past any redirection."""
    torch.set_num_threads(1)

    def run(*words) -> Result:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def upcycled(tmp_path_factory):
    """The demo's dense model with 3 experts, 2 of them per token."""
    folder = tmp_path_factory.mktemp("cli") / "upcycled"
    upcycle(DEMO_MODEL, folder, experts=3, top_k=2, verify=False, progress=False)
    return folder
