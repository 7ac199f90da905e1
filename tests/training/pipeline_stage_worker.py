"""Whole recipes over the stages of a pipeline: run by torchrun, each command in the JSON file argv[1] in turn."""

import json
import sys
from pathlib import Path

from hf_moe.training.main import main

from tests.processes import leave

if __name__ == "__main__":
    for command in json.loads(Path(sys.argv[1]).read_text()):
        main(command)
    leave()
