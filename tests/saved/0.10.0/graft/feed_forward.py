"""The dense feed-forward networks of any decoder: found by structure, and tried before they are believed.

Shapes: D hidden size, I intermediate size.
"""

import copy
import inspect
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS, ACT2FN
from transformers.pytorch_utils import Conv1D

GATES = ("gate", "w1")  # in the name of the projection that is activated, of two that read
BETWEEN = ("activation_fn", "act_fn", "activation")  # what a layer calls the activation between projections of its own
DROPOUTS = ("hidden_dropout", "dropout")  # what networks that drop without a module call their rate
NARROW = (6, 10)  # D and I at which a network is tried


class Part(NamedTuple):
    """Where a part [rows, columns] of a network stands: some `rows` of a tensor, which may be stored [in, out]."""

    tensor: str
    rows: slice
    transposed: bool = False

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        return (tensor.mT if self.transposed else tensor)[self.rows]


class FeedForward(NamedTuple):
    """One network: down(act(factor * gate(x)) * up(x)) * scale, or down(act(up(x))) * scale.

    path: where it stands in the model. parts: "gate_proj.weight" [I, D] and so on -> where it is, within `path`.
    norm: a norm before the down projection. residual: its forward adds a second argument. dropout: of its output, in
    training. loose: the projections and the activation stand in the layer itself, under these names.
    """

    path: str
    hidden: int
    width: int
    parts: dict[str, Part]
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    gate_multiplier: float
    scale: float
    norm: nn.Module | None
    residual: bool
    dropout: float
    loose: tuple[str, ...]

    @property
    def gated(self) -> bool:
        return "gate_proj.weight" in self.parts

    @property
    def bias(self) -> bool:
        return any(name.endswith("bias") for name in self.parts)

    @property
    def hidden_act(self) -> str:
        """Transformers' name for the activation; where it has none, its class."""
        kind = type(self.act_fn)
        names = (name for name, known in ACT2CLS.items() if (known[0] if isinstance(known, tuple) else known) is kind)
        return next(names, kind.__name__)

    @property
    def tensors(self) -> set[str]:
        """Names, within `path`, of all its tensors that become experts."""
        return {part.tensor for part in self.parts.values()}


def find_feed_forwards(model: PreTrainedModel) -> dict[int, FeedForward]:
    """The networks of the layers of a model's decoder by the layer's index.

    Where layers stand in several stacks, they are counted through. Raises nothing: a layer may have none.
    """
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel):  # ModernBERT calls its head so
        decoder = model.base_model
    hidden = decoder.config.get_text_config(decoder=True).hidden_size
    inner = [name for name, x in decoder.named_modules() if name and isinstance(x, PreTrainedModel)]
    before = next(name for name, x in model.named_modules() if x is decoder)
    found: dict[str, FeedForward] = {}  # by the layer's path
    for name, module in decoder.named_modules():
        layer = re.match(r"(.*?\.)?\d+(?=\.|$)", name)
        if layer is None or any(name == other or name.startswith(f"{other}.") for other in inner):
            continue
        network = read(module, f"{before}.{name}" if before else name, hidden)
        # Of several in a layer, the widest: others are of low rank (Gemma 3n's laurel).
        if network is not None and (layer[0] not in found or network.width > found[layer[0]].width):
            found[layer[0]] = network
    indices = [int(re.search(r"\d+$", layer)[0]) for layer in found]
    counted = indices if len(set(indices)) == len(indices) else range(len(found))
    return dict(zip(counted, found.values(), strict=True))


def read(module: nn.Module, path: str, hidden: int) -> FeedForward | None:
    """The network that a module is, None where it is none."""
    children = dict(module.named_children())
    loose = ()
    if {"fc1", "fc2"} <= children.keys() and "self_attn" in children:  # OPT, XGLM: in the layer itself
        act = next((name for name in BETWEEN if name in children), None)
        if act is None:
            return None
        loose = ("fc1", act, "fc2")
        children = {name: children[name] for name in loose}
    if "Attention" in type(module).__name__:
        return None
    projections = {name: sizes(x) for name, x in children.items() if sizes(x)}
    others = {name: x for name, x in children.items() if name not in projections and not isinstance(x, nn.Dropout)}
    dropouts = [x for name, x in children.items() if isinstance(x, nn.Dropout)]
    norms = [x for x in others.values() if "Norm" in type(x).__name__]
    activations = [x for x in others.values() if "Norm" not in type(x).__name__]
    own = not loose and next(module.parameters(recurse=False), None) is not None
    if own or len(norms) > 1 or len(activations) > 1 or not 2 <= len(projections) <= 3:
        return None
    found = next(filter(None, (arranged(projections, down, hidden) for down in reversed(projections))), None)
    if found is None:
        return None
    readers, down, outs, width = found
    if len(readers) == 2:
        gates = [name for name in readers if any(mark in name for mark in GATES)]
        if len(gates) != 1:
            return None
        readers.sort(key=lambda name: name not in gates)
    names = ("gate_proj", "up_proj") if sum(outs) == 2 * width else ("up_proj",)
    places = [(name, slice(0, width)) for name in readers]
    if outs == [2 * width]:
        places = [(readers[0], slice(0, width)), (readers[0], slice(width, 2 * width))]
    places.append((down, slice(0, hidden)))
    parts = {}
    for name, (child, rows) in zip((*names, "down_proj"), places, strict=True):
        parts[f"{name}.weight"] = Part(f"{child}.weight", rows, isinstance(children[child], Conv1D))
        if children[child].bias is not None:
            parts[f"{name}.bias"] = Part(f"{child}.bias", rows)
    said = next((getattr(module, name) for name in DROPOUTS if isinstance(getattr(module, name, None), float)), 0.0)
    return FeedForward(
        path=path,
        hidden=hidden,
        width=width,
        parts=parts,
        act_fn=activations[0] if activations else ACT2FN["silu"],
        gate_multiplier=float(getattr(module, "gate_multiplier", 1.0)),
        scale=float(getattr(module, "down_multiplier", 1.0)),
        norm=norms[0] if norms else None,
        residual=not loose and takes_residual(module),
        dropout=0.0 if loose else dropouts[0].p if dropouts else said,
        loose=loose,
    )


def arranged(projections: dict[str, tuple[int, int]], down: str, hidden: int) -> tuple | None:
    """Those that read, the one that writes if it is `down`, the former's sizes and I; None where sizes do not fit."""
    readers = [name for name in projections if name != down]
    width, outs = projections[down][0], [projections[name][1] for name in readers]
    fits = projections[down][1] == hidden and all(projections[name][0] == hidden for name in readers)
    return (readers, down, outs, width) if fits and outs in ([width], [2 * width], [width, width]) else None


def sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a projection."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return tuple(module.weight.shape) if isinstance(module, Conv1D) else None


def takes_residual(module: nn.Module) -> bool:
    """Whether its forward has a second argument without a default (BLOOM, MPT)."""
    given = list(inspect.signature(module.forward).parameters.values())
    return len(given) == 2 and given[1].default is inspect.Parameter.empty and given[1].kind != given[1].VAR_KEYWORD


def narrowed(module: nn.Module, network: FeedForward) -> tuple[nn.Module, FeedForward]:
    """The module at the sizes of `NARROW` with random weights on the CPU, and the network that it then is."""
    hidden, width = NARROW
    generator = torch.Generator("cpu").manual_seed(0)
    act_fn, norm = (settled(x, width, generator) for x in (network.act_fn, network.norm))
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    twin.training = False
    for name, child in module.named_children():
        new = act_fn if child is network.act_fn else norm if child is network.norm else child
        twin._modules[name] = nn.Identity() if isinstance(child, nn.Dropout) else new
    parts = {}
    for name, part in network.parts.items():
        child, _, kind = part.tensor.rpartition(".")
        shares = sum(other.tensor == part.tensor for other in network.parts.values())
        ins, outs = (width, hidden) if name.startswith("down") else (hidden, shares * width)
        if kind == "weight":
            twin._modules[child] = drawn(module.get_submodule(child), ins, outs, generator)
        rows = outs // shares
        first = 0 if part.rows.start == 0 else rows
        parts[name] = part._replace(rows=slice(first, first + rows))
    return twin, network._replace(hidden=hidden, width=width, parts=parts, act_fn=act_fn, norm=norm)


def drawn(projection: nn.Module, ins: int, outs: int, generator: torch.Generator) -> nn.Module:
    """A projection of this kind, drawn anew."""
    new = copy.copy(projection)
    new.__dict__["_parameters"] = {}
    if isinstance(projection, Conv1D):
        new.nf, shape = outs, (ins, outs)
    else:
        new.in_features, new.out_features, shape = ins, outs, (outs, ins)
    new.weight = nn.Parameter(torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32))
    bias = (
        None if projection.bias is None else torch.randn(outs, generator=generator, device="cpu", dtype=torch.float32)
    )
    new.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    return new


def settled(module, width: int, generator: torch.Generator):
    """An activation or a norm with parameters in (0, 1) on the CPU, vectors of `width`; what is no module as it is."""
    if not isinstance(module, nn.Module):
        return module
    new = copy.deepcopy(module)
    for part in new.modules():
        for name, x in part.named_parameters(recurse=False):
            shape = (width,) if x.dim() == 1 and x.numel() > 1 else x.shape
            value = torch.rand(shape, generator=generator, device="cpu", dtype=torch.float32)
            part._parameters[name] = nn.Parameter(value)
        for name, x in part.named_buffers(recurse=False):
            part._buffers[name] = torch.full(x.shape, 0.5, device="cpu", dtype=torch.float32)
    return new
