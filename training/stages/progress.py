"""What a run says while it goes: a line at each log, on standard error. The whole log is in trainer_state.json."""

import sys

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ..data.sources import loss_names

# Of a log's many numbers those that tell how it goes, by what they are called in the line.
SHOWN = {
    "loss": "loss",
    "reward": "reward",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "learning_rate": "lr",
    "router_load_max": "busiest expert",
    "router_load_entropy": "load entropy",
    "router_dead_experts": "dead",
}
UNITS = {"router_load_max": "x"}  # times the mean load


def line(logs: dict[str, float], step: int, steps: int, held_out: dict[str, str]) -> str | None:
    """A log in one line; None where there is nothing to say. `held_out`: losses -> what to call them, `loss_names`."""
    said = [said_number(label, logs[name], UNITS.get(name, "")) for name, label in SHOWN.items() if name in logs]
    for loss, label in held_out.items():
        if loss in logs:
            prefix = loss.removesuffix("loss")
            of = {name.removeprefix(prefix): value for name, value in logs.items() if name.startswith(prefix)}
            said += [
                said_number(label if name == "loss" else word, of[name], UNITS.get(name, ""))
                for name, word in SHOWN.items()
                if name in of
            ]
    if "train_runtime" in logs:
        said = [f"trained for {logs['train_runtime']:.0f} s, {logs['train_samples_per_second']:.3g} rows a second"]
    return f"step {step:>{len(str(steps))}}/{steps}: {', '.join(said)}" if said else None


def said_number(label: str, value: float, unit: str = "") -> str:
    return f"{label} {value:.4g}{unit}"


class Lines(TrainerCallback):
    """A line instead of a dictionary at each log."""

    training_bar = None

    def __init__(self, trainer: Trainer):
        super().__init__()
        self.trainer = trainer

    def on_log(self, args, state, control, logs=None, **kwargs):
        said = line(logs, state.global_step, state.max_steps, loss_names(self.trainer))
        if said is None or not state.is_world_process_zero:
            return
        if self.training_bar is None:
            print(said, file=sys.stderr, flush=True)
        else:
            self.training_bar.write(said, file=sys.stderr)


class LinesOverBar(Lines, ProgressCallback):
    """And Transformers' bar."""


def close_bar(trainer: Trainer) -> None:
    """Ends the line that Transformers' bar stands on, where an error keeps that from its end."""
    for callback in trainer.callback_handler.callbacks:
        if getattr(callback, "training_bar", None) is not None:
            callback.training_bar.close()


def say_in_lines(trainer: Trainer) -> None:
    """In place of what Transformers' trainers print; a notebook's table stays."""
    if trainer.pop_callback(PrinterCallback) is not None:
        trainer.add_callback(Lines(trainer))
    elif trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(LinesOverBar(trainer))
