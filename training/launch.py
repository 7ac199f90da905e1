"""Many processes: the launch files of Accelerate that come along, by name, and the command that starts with one."""

import os
import sys
from pathlib import Path
from typing import NoReturn

LAUNCH_FILES = Path(__file__).parent / "accelerate"


def shipped_launch_files() -> dict[str, Path]:
    """The launch files that come with hf_moe: name to file."""
    return {path.stem: path for path in sorted(LAUNCH_FILES.glob("*.yaml"))}


def find_launch_file(name: str) -> Path:
    """The YAML file `name`, or the shipped one of that name. Raises FileNotFoundError if there is neither."""
    path = Path(name) if Path(name).is_file() else shipped_launch_files().get(name)
    if path is None:
        raise FileNotFoundError(f"No launch file {name}: give a file, or one of {', '.join(shipped_launch_files())}.")
    return path


def launch(name: str, argv: list[str]) -> NoReturn:
    """Become `accelerate launch` of `hf-moe train` with the arguments `argv`, one process for each GPU.

    Raises FileNotFoundError as `find_launch_file`, ValueError where there is no GPU.
    """
    import torch

    path, processes = find_launch_file(name), torch.cuda.device_count()
    if not processes:
        raise ValueError(f"--accelerate {name} starts a process for each GPU, and there is none.")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    command += ["--num_processes", str(processes), "--module", "hf_moe_cli", "train", *argv]
    os.execv(sys.executable, command)
