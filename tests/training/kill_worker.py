"""Runs of `hf-moe train`, some of them killed: each is a fork of this process, so that TRL is imported once.

Reads the arguments of `run` from the JSON file argv[1], a list, and prints what it returns for each.
"""

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

import hf_moe_cli
import transformers.trainer
from hf_moe.training.output.checkpoints import last_checkpoint
from transformers import TrainerCallback


class Kill(TrainerCallback):
    """Ends the process in the middle of a step: after the backward pass, before the optimizer moves."""

    step = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def train(argv: list[str], rank: int, processes: int, port: int, step: int | None) -> None:
    """Never returns."""
    if processes > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    Kill.step = step
    code = 1
    try:
        code = hf_moe_cli.main(["train", *argv])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(argv: list[str], processes: int, step: int | None) -> list[int]:
    port, children = free_port(), []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            train(argv, rank, processes, port, step)
        children.append(child)
    return children


def finish(children: list[int], killed_after: float | None) -> list[int]:
    """How each process ended, as `os.waitstatus_to_exitcode` says it."""
    if killed_after is not None:
        time.sleep(killed_after)
        for child in children:
            os.kill(child, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def run(argv: list[str], output: str, processes: int, step: int | None = None, kills: int = 0) -> list[list[int]]:
    """Train into `output`, killed at `step` or else `kills` times at any moment, and resumed until it is done."""
    argv, began, ended = [*argv, "--output_dir", output], time.monotonic(), []
    if kills:  # how long it takes
        finish(start([*argv[:-1], f"{output}-timed"], processes, None), None)
    whole = time.monotonic() - began
    while not ended or any(ended[-1]):
        moment = random.uniform(0.1, 1) * whole if len(ended) < kills else None
        resume = ["--resume_from_checkpoint", "true"] if last_checkpoint(output) else []
        if not resume:
            shutil.rmtree(output, ignore_errors=True)
        ended.append(finish(start([*argv, *resume], processes, step if not ended else None), moment))
        if any(ended[-1]) and -signal.SIGKILL not in ended[-1]:  # it failed by itself
            break
    return ended


def main(jobs: str) -> None:
    transformers.trainer.DEFAULT_CALLBACKS.append(Kill)
    hf_moe_cli.main(["train", "--check", "tiny/sft"])  # imports what every fork needs
    print(json.dumps([run(**job) for job in json.loads(Path(jobs).read_text())]))


if __name__ == "__main__":
    main(*sys.argv[1:])
