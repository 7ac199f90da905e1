"""What a training forward keeps for the backward pass, counted on fake tensors: nothing is allocated or computed."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from transformers import AttentionInterface
from transformers.integrations import moe
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_layers import GradientCheckpointingLayer

from ..kernels import experts as kernels
from ..kernels.copies import Copies
from ..kernels.formula import formula
from ..kernels.recomputation import SELECTIVE, Keeping, Selective
from ..model.modeling_hf_moe_graft import HfMoeGraftForCausalLM

OUTSIDE = -1  # of all layers
Storages = dict[int, torch.UntypedStorage]
UNMASKED = "hf_moe_unmasked"  # Transformers makes no mask for an attention that it has no masks of


def unmasked_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: None, scaling: float, **given
) -> tuple[torch.Tensor, None]:
    """sdpa. Where values are narrower than keys, as in latent attention, by a kernel that GPUs have for it: sdpa on
    the CPU, where fake tensors are, would make all scores."""
    if query.shape[-1] == value.shape[-1]:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **given)
    fused = torch.ops.aten._scaled_dot_product_efficient_attention
    output, *_ = fused(query, key, value, None, True, 0.0, True, scale=scaling)
    return output.transpose(1, 2), None


AttentionInterface.register(UNMASKED, unmasked_attention)


class Activations(NamedTuple):
    """Bytes that a forward keeps, and those of them that are the largest layer's."""

    kept: int
    of_layer: int


def activation_bytes(
    model: nn.Module,
    rows: int,
    length: int,
    bf16: bool,
    checkpointing: bool | str,
    experts: str,
    copies: bool = False,
) -> Activations | None:
    """Bytes that the decoder of `model` keeps of a micro-batch [rows, length], without the head's logits.

    `model` is on the meta device, frozen where it will be, and made fake. The tensors that autograd saves are added
    up, weights apart, storage by storage; copies of weights that autocast makes count, of the experts' where none are
    held for the step (`copies`). With checkpointing, the input of every layer and all of the largest layer; selective,
    also what each keeps. `experts` are computed by hf_moe's kernels or Transformers' grouped_mm; attention is causal,
    with no mask in memory. None where the routing decides about sizes, so that they cannot be counted.
    """
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    decoder, is_graft = whole.base_model, isinstance(whole, HfMoeGraftForCausalLM)
    if is_graft and whole.config._attn_implementation == "sdpa":
        whole.set_attn_implementation(UNMASKED)
    elif whole.config._attn_implementation == "sdpa":
        whole.config._attn_implementation = UNMASKED
    for part in decoder.modules():
        if hasattr(part, "has_gate"):
            formula(part)  # found out by values, which fake tensors have none of
    saved: dict[int, Storages] = {}  # layer -> what it saved first
    inputs: list[int] = []
    modes: list[Keeping] = []  # of each layer, under selective checkpointing
    selective = Selective()
    with FakeTensorMode(), fake_grouped_mm(), kernels_anywhere():
        make_fake(model)
        own = {x.untyped_storage()._cdata for x in model.parameters()}
        weights = [x for x in model.parameters() if x.dim() == 3 and x.dtype == torch.float32]
        held = Copies(weights if copies else [], torch.bfloat16)
        own |= {held.of(x).untyped_storage()._cdata for x in held.made}
        seen = set(own)
        place = [OUTSIDE]

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                saved.setdefault(place[0], {})[storage._cdata] = storage
            return tensor

        def enter(module, args):
            place[0] = len(inputs)
            inputs.append(args[0].nbytes)
            if checkpointing == SELECTIVE:
                modes.append(selective.contexts()[0].__enter__())

        def leave(module, args, output):
            place[0] = OUTSIDE
            if checkpointing == SELECTIVE:
                modes[-1].__exit__(None, None, None)

        if checkpointing == SELECTIVE:
            selective.begin(whole)
        for layer in decoder.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.register_forward_pre_hook(enter)
                layer.register_forward_hook(leave)
        decoder.train()
        whole.config._experts_implementation = experts
        ids = torch.zeros(rows, length, dtype=torch.long)
        # Told that there is nothing to mask; asked, Transformers makes masks of fake tensors that it would leave out.
        no_masks = {} if is_graft else {"attention_mask": dict.fromkeys(decoder.config.layer_types)}
        held.begin()
        try:
            with (
                whole.text.read(None, ids, None) if is_graft else nullcontext(),
                torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
                torch.autocast("cpu", torch.bfloat16, enabled=bf16),
            ):
                decoder(input_ids=ids, use_cache=False, **no_masks)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return None
        finally:
            held.end()
            selective.end()
    return total(saved, inputs, [mode.storages() for mode in modes], checkpointing)


def total(
    saved: dict[int, Storages], inputs: list[int], kept: list[Storages], checkpointing: bool | str
) -> Activations:
    """Of what layers save without checkpointing, of their inputs' bytes, and of what they keep if it is selective."""
    outside = size(saved.get(OUTSIDE, {}))
    layers = [saved.get(place, {}) for place in range(len(inputs))]
    largest = max(map(size, layers), default=0)
    if not checkpointing:
        return Activations(outside + sum(map(size, layers)), largest)
    kept = kept or [{}] * len(layers)
    again = [size({x: layer[x] for x in layer.keys() - own.keys()}) for layer, own in zip(layers, kept, strict=True)]
    return Activations(outside + sum(inputs) + sum(map(size, kept)) + max(again, default=0), largest)


def size(storages: Storages) -> int:
    return sum(storage.nbytes() for storage in storages.values())


def make_fake(model: nn.Module) -> None:
    """In place of the meta tensors of `model` fake ones, on the CPU as autocast and attention see it."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:  # tied weights stay tied
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    made[id(tensor)] = (
                        nn.Parameter(fake, tensor.requires_grad) if table is module._parameters else fake
                    )
                table[name] = made[id(tensor)]


@contextmanager
def kernels_anywhere() -> Iterator[None]:
    """hf_moe's kernels take these experts though there is no GPU: what they compute has shapes, and no values."""
    real, kernels.unusable = kernels.unusable, lambda device: None
    try:
        yield
    finally:
        kernels.unusable = real


@contextmanager
def fake_grouped_mm() -> Iterator[None]:
    """In place of the grouped product inside Transformers' grouped_mm one that saves the same and has its shapes.

    PyTorch's own knows no fake tensors in float32, and autocast leaves it alone.
    """

    def product(rows: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return rows.to(weight.dtype) @ weight[0]

    real = moe._grouped_mm
    moe._grouped_mm = product
    try:
        yield
    finally:
        moe._grouped_mm = real
