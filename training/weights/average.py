"""An exponential moving average of the weights, on the CPU in float32, as DeepSeek-V3 keeps one.

Paper: https://arxiv.org/abs/2412.19437, 3.2.3. It costs no memory on the device, and one copy of the trained weights
to the CPU a step, beside the next step's work. Under FSDP2 each process has the average of its shards.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_moe.staging import written_aside

AVERAGE_FILE = "weight_average.safetensors"


class WeightAverage:
    """The average a of a model's trained weights w: a becomes decay a + (1 - decay) w after each optimizer step.

    `update` begins it: a stream beside the present one copies the weights to memory of the host, and a thread blends
    them in. `let_move` has to come before the weights move; whatever reads the averages waits.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.of_parts: dict[str, torch.Tensor] = {}
        self.copies: dict[str, torch.Tensor] = {}
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.blending: Future | None = None
        self.stream = self.copied = None  # of a GPU

    @property
    def averages(self) -> dict[str, torch.Tensor]:
        """Name -> what this process has of it."""
        self.wait()
        return self.of_parts

    def wait(self) -> None:
        """Until the last update is done."""
        if self.blending is not None:
            self.blending.result()
            self.blending = None

    @torch.no_grad()
    def start(self, model: nn.Module) -> None:
        """Begin with the weights as they are."""
        self.wait()
        self.copies = {}
        self.of_parts = {name: on_cpu(weight).clone() for name, weight in trained(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        weights = {name: part(weight) for name, weight in trained(model).items()}
        self.wait()
        if not self.copies:
            on_gpu = any(weight.is_cuda for weight in weights.values())
            self.stream = torch.cuda.Stream() if on_gpu else None
            self.copies = {
                name: torch.empty_like(weight, device="cpu", pin_memory=weight.is_cuda)
                for name, weight in weights.items()
            }
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # of None does nothing
            for name, weight in weights.items():
                self.copies[name].copy_(weight, non_blocking=True)
            self.copied = None if self.stream is None else self.stream.record_event()
        self.blending = self.thread.submit(self.blend, self.copied)

    def let_move(self) -> None:
        """The optimizer may write to the weights once they are copied."""
        if self.copied is not None:
            torch.cuda.current_stream().wait_event(self.copied)

    @torch.no_grad()
    def blend(self, copied: torch.cuda.Event | None) -> None:
        if copied is not None:
            copied.synchronize()
        for name, copy in self.copies.items():
            self.of_parts[name].lerp_(copy.float(), 1 - self.decay)

    def whole(self, model: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
        """The averages of whole weights, by all processes together, for those that `keep` them."""
        found = {}
        for name, weight in trained(model).items():
            average = gathered(self.averages[name], weight)
            if keep:
                found[name] = average
        return found

    def load(self, folder: str | Path, model: nn.Module) -> None:
        """Go on with what was saved. Raises FileNotFoundError or ValueError where that is not this model's average."""
        path = Path(folder) / AVERAGE_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {AVERAGE_FILE}: it was saved without ema_decay; leave it out.")
        saved = load_file(path)
        for name, weight in trained(model).items():
            if name not in saved or saved[name].shape != weight.shape:
                raise ValueError(f"{path} has no average of {name} {list(weight.shape)}: it is another run's.")
        self.wait()
        self.of_parts = {name: part_of(saved[name], weight) for name, weight in trained(model).items()}

    @contextmanager
    def in_place_of_weights(self, model: nn.Module) -> Iterator[None]:
        """Give the model the averages inside the context, each in its weight's type."""
        weights = trained(model)
        kept = {name: part(weight).to("cpu", copy=True) for name, weight in weights.items()}
        try:
            overwrite(weights, self.averages)
            yield
        finally:
            overwrite(weights, kept)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def part(weight: torch.Tensor) -> torch.Tensor:
    """What this process has of a weight: its shard, or all of it."""
    weight = weight.detach()
    return weight.to_local() if isinstance(weight, DTensor) else weight


def part_of(whole: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Of a whole tensor on the CPU what this process has of `weight`."""
    if not isinstance(weight, DTensor):
        return whole
    mesh = weight.device_mesh
    shard = distribute_tensor(whole.to(mesh.device_type), mesh, weight.placements, src_data_rank=None)
    return shard.to_local().to("cpu", copy=True)


def gathered(own: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The whole tensor on the CPU, of which each process has its own part, as it has of `weight`."""
    if not isinstance(weight, DTensor):
        return own
    mesh, layout = weight.device_mesh, {"shape": weight.shape, "stride": weight.stride()}
    shards = DTensor.from_local(own.to(mesh.device_type), mesh, weight.placements, run_check=False, **layout)
    return shards.full_tensor().cpu()


def write_average(average: dict[str, torch.Tensor], folder: str | Path) -> None:
    with written_aside(Path(folder) / AVERAGE_FILE) as aside:
        save_file(average, aside)


def on_cpu(weight: torch.Tensor) -> torch.Tensor:
    return part(weight).to("cpu", torch.float32)


@torch.no_grad()
def overwrite(weights: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    for name, weight in weights.items():
        part(weight).copy_(values[name])


def check_average(decay: float, trainer) -> None:
    """Raises ValueError for a decay that averages nothing, or weights that lie where no process can average them."""
    if not 0 < decay < 1:
        raise ValueError(f"ema_decay is {decay}; it must be between 0 and 1, as 0.999.")
    first_fsdp = trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2
    if first_fsdp or trainer.is_deepspeed_enabled or trainer.spread:
        raise ValueError(
            "ema_decay needs weights that are whole or in FSDP2's shards: leave it out under DeepSpeed, the first FSDP"
            " and expert parallelism."
        )
