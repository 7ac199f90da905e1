"""What a strategy is given, and what it gives: the experts of one layer, tensor by tensor.

Shapes: D hidden size, I intermediate size, T tokens of the calibration text.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch

from ..files.writer import Output
from .evidence import Evidence
from .feed_forward import FeedForward

# Of a strategy's or a router's options: the user has to give it.
REQUIRED = object()

# The axis of each part of a feed-forward network that counts its I neurons; the output's bias belongs to none.
NEURON_AXIS = {
    **{"gate_proj.weight": 0, "gate_proj.bias": 0, "up_proj.weight": 0, "up_proj.bias": 0},
    **{"down_proj.weight": 1, "down_proj.bias": None},
}
CHUNK = 1 << 20  # numbers that are worked on in float32 or float64 at a time


@dataclass(frozen=True)
class Request:
    """What is asked of a strategy, whatever the layer. `options` are its own, complete with their defaults."""

    experts: int
    top_k: int
    width: int  # I of the dense network
    dtype: torch.dtype
    sources: int
    options: Mapping[str, Any]

    def require_divisor(self, pieces: int, what: str) -> None:
        if self.width % pieces:
            possible = [str(n) for n in range(2, min(self.width, 257)) if self.width % n == 0]
            raise ValueError(
                f"The dense intermediate size {self.width} cannot be cut into {what} ({pieces}); it can into "
                f"{', '.join(possible[:12]) or 'nothing'}."
            )

    def exact_factor(self, factor: float) -> bool:
        """Whether a product of weights and `factor` is the same number in the checkpoint's dtype, or nearly so."""
        return math.frexp(factor)[0] == 0.5 or self.dtype in (torch.float32, torch.float64)


class Sizes(NamedTuple):
    """The layer that a strategy makes. Experts `tied` by `tied` have the same router row, so they are chosen together.

    exact: the new model computes what the dense one computes, some strategies only where the router weighs all experts
    alike. Otherwise the difference is reported.
    """

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    exact: bool
    needs_uniform_router: bool = False
    tied: int = 1
    n_shared_experts: int = 0
    shared_expert_intermediate_size: int | None = None

    def config_fields(self) -> dict[str, int]:
        """These sizes as fields of HfMoeConfig."""
        said = self._asdict()
        ours = ("exact", "needs_uniform_router", "tied")
        return {name: value for name, value in said.items() if name not in ours and value is not None}


@dataclass(frozen=True)
class Layer:
    """One layer of the dense model: its feed-forward network in each source, and what is known about it."""

    index: int
    networks: Sequence[FeedForward]
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    evidence: Evidence
    seed: int
    hidden_size: int

    @property
    def network(self) -> FeedForward:
        return self.networks[0]

    def generator(self, *purpose: object) -> torch.Generator:
        """A generator of its own for each layer and purpose, so that the order of writing does not matter."""
        name = "/".join(map(str, (self.seed, self.index, *purpose)))
        digest = hashlib.sha256(name.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def neurons(self, inputs: torch.Tensor) -> torch.Tensor:
        """What each neuron hands to the down projection, act(gate(x)) * up(x): [T, I] of inputs [T, D], float32."""

        def linear(name: str) -> torch.Tensor:
            bias = self.network.get(f"{name}.bias")
            weight = self.network[f"{name}.weight"].float()
            return torch.nn.functional.linear(inputs, weight, None if bias is None else bias.float())

        up = linear("up_proj")
        return self.act_fn(linear("gate_proj")) * up if "gate_proj.weight" in self.network else self.act_fn(up)


class Strategy:
    """One layer's experts. A subclass says in `sizes` what the layer is like and yields its tensors.

    `options` names what the strategy reads beside `experts` and `top_k`, with the defaults; whatever else is given is
    refused. `router_init` is the default one.
    """

    options: ClassVar[Mapping[str, Any]] = {}
    takes_siblings: ClassVar[bool] = False  # of one model, each fine-tuned on its own
    held_matrices: ClassVar[int] = 4  # of the dense network's size, at most, while a piece is made; 0: views of files

    def __init__(self, request: Request, layer: Layer):
        self.request, self.layer = request, layer

    @classmethod
    def sizes(cls, request: Request) -> Sizes:
        """The layer to make. Raises a ValueError of one line for a request that cannot be met."""
        raise NotImplementedError

    @classmethod
    def router_init(cls, request: Request) -> str:
        """The way the router starts where the user names none."""
        return "normal"

    @classmethod
    def rest(cls, request: Request, outputs: Sequence[Output]) -> Output:
        """A tensor outside the sparse layers, given that of each source."""
        return outputs[0]

    def experts(self, parts: Sequence[str]) -> Iterator[torch.Tensor]:
        """The named parts of expert 0, then of expert 1, and so on."""
        raise NotImplementedError

    @property
    def held(self) -> int:
        """About how many bytes of memory making a piece takes: such matrices, and chunks in float64 and afterwards."""
        pieces = self.request.options.get("granularity", 1)
        matrix = self.request.width // pieces * self.layer.hidden_size * self.request.dtype.itemsize
        cut_out = 2 if pieces > 1 else 0  # columns of the down projection, before and after they are scaled
        return (self.held_matrices + cut_out) * matrix + (8 * 8 * CHUNK if self.held_matrices else 0)

    def shared(self, part: str) -> torch.Tensor:
        """A part of the shared experts, which are one network. Asked only if `sizes` says that there are some."""
        raise NotImplementedError

    @cached_property
    def affinity(self) -> torch.Tensor | None:
        """How much each expert does for each calibration token, [T, E]; None if all could do the same."""
        return None


def take(part: str, tensor: torch.Tensor, neurons: torch.Tensor | slice) -> torch.Tensor:
    """The `neurons` of one part of a network."""
    axis = NEURON_AXIS[part]
    return tensor if axis is None else tensor[neurons] if axis == 0 else tensor[:, neurons]


def chunks(tensor: torch.Tensor, rows: torch.Tensor | None = None) -> Iterator[torch.Tensor]:
    """The tensor in order, or some of its `rows`, a few at a time, so that little is held in float32."""
    count = max(1, CHUNK // max(1, tensor[0].numel()))
    return iter(tensor.split(count)) if rows is None else (tensor[some] for some in rows.split(count))


def mean_and_std(tensor: torch.Tensor, rows: torch.Tensor | None = None) -> tuple[float, float]:
    """Mean and population standard deviation of all numbers, or of those in some `rows`, in float64."""
    numel = tensor.numel() if rows is None else len(rows) * tensor[0].numel()
    mean = sum(chunk.double().sum().item() for chunk in chunks(tensor, rows)) / numel
    squares = sum((chunk.double() - mean).square().sum().item() for chunk in chunks(tensor, rows))
    return mean, (squares / numel) ** 0.5
