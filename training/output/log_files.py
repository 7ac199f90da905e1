"""What a run logs, as files beside it: a line of JSON for each log, and a picture of the curves so far."""

import json
import time
from pathlib import Path

from transformers import TrainerCallback

from hf_moe.hub import CURVES, METRICS, draw_curves
from hf_moe.staging import written_aside

SECONDS = 60  # between two pictures; the last one is the card's


class LogFiles(TrainerCallback):
    """Writes `metrics.jsonl` to `output_dir` as the Trainer logs, and the training curves whenever it saves.

    A resumed run goes on with the lines up to its checkpoint.
    """

    def __init__(self):
        self.drawn = time.monotonic()

    def on_train_begin(self, args, state, control, **kwargs):
        path = Path(args.output_dir) / METRICS
        if state.is_world_process_zero and (state.log_history or path.exists()):
            with written_aside(path) as aside:
                aside.write_text("".join(map(line, state.log_history)), encoding="utf-8")

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.log_history:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / METRICS).open("a", encoding="utf-8") as file:
                file.write(line(state.log_history[-1]))

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero and time.monotonic() - self.drawn > SECONDS:
            draw_curves(state.log_history, Path(args.output_dir) / CURVES)
            self.drawn = time.monotonic()


def line(entry: dict) -> str:
    return json.dumps(entry, default=float) + "\n"
