"""An exponential moving average of the weights, on the CPU in float32, as DeepSeek-V3 keeps one.

Paper: https://arxiv.org/abs/2412.19437, 3.2.3. It costs no memory on the device, and one copy of the trained weights
to the CPU a step.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

AVERAGE_FILE = "weight_average.safetensors"


class WeightAverage:
    """The average a of a model's trained weights w: a becomes decay a + (1 - decay) w after each optimizer step."""

    def __init__(self, decay: float):
        self.decay = decay
        self.averages: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def start(self, model: nn.Module) -> None:
        """Begin with the weights as they are."""
        self.averages = {name: on_cpu(weight).clone() for name, weight in trained(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for name, weight in trained(model).items():
            self.averages[name].lerp_(on_cpu(weight), 1 - self.decay)

    def save(self, folder: str | Path) -> None:
        aside = Path(folder) / f".{AVERAGE_FILE}"
        save_file(self.averages, aside)
        aside.replace(Path(folder) / AVERAGE_FILE)

    def load(self, folder: str | Path, model: nn.Module) -> None:
        """Go on with what was saved. Raises FileNotFoundError or ValueError where that is not this model's average."""
        path = Path(folder) / AVERAGE_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {AVERAGE_FILE}: it was saved without ema_decay; leave it out.")
        saved = load_file(path)
        for name, weight in trained(model).items():
            if name not in saved or saved[name].shape != weight.shape:
                raise ValueError(f"{path} has no average of {name} {list(weight.shape)}: it is another run's.")
        self.averages = {name: saved[name] for name in trained(model)}

    @contextmanager
    def in_place_of_weights(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averages inside the context, each in its weight's type."""
        weights = trained(model)
        kept = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
        try:
            overwrite(weights, self.averages)
            yield
        finally:
            overwrite(weights, kept)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def on_cpu(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().to("cpu", torch.float32)


@torch.no_grad()
def overwrite(weights: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        weight.copy_(values[name])


def check_average(decay: float, trainer) -> None:
    """Raises ValueError for a decay that averages nothing, or weights that no process has whole."""
    if not 0 < decay < 1:
        raise ValueError(f"ema_decay is {decay}; it must be between 0 and 1, as 0.999.")
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer.spread:
        raise ValueError(
            "ema_decay needs every weight in one process: leave it out under FSDP, DeepSpeed and expert parallelism."
        )
