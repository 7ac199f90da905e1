"""Selective recomputation: a layer keeps its products and attention, and computes again what stands between them.

DeepSeek-V3, https://arxiv.org/abs/2412.19437, 3.2.3 and 3.3.3: norms, latent attention's up-projections and
activations cost little, and what they make is much. It is torch's non-reentrant checkpointing, with two modes around a
layer's forward and its repetition. torch's own pair (`create_selective_checkpoint_contexts`) keeps all outputs of an
operator or none, and asks that both call the same operators, of which FSDP2 calls others while it gathers.
"""

from collections import deque
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map_only

SELECTIVE = "selective"  # as a value of activation_checkpointing

# bmm is none of these: what it makes here are the scores of eager attention.
PRODUCTS = {
    *("aten::mm", "aten::addmm", "aten::_grouped_mm", "aten::_scaled_mm", "aten::_scaled_grouped_mm"),
    "transformers::grouped_mm_fallback",
    *("hf_moe::experts_up", "hf_moe::experts_narrow", "hf_moe::experts_down"),
    *("hf_moe::fp8_experts_up", "hf_moe::fp8_experts_narrow", "hf_moe::fp8_experts_down", "hf_moe::fp8_linear"),
}
# In the names of torch's attentions, of the package flash-attn, and of what the Hub has of it.
ATTENTION = (
    *("_scaled_dot_product_", "_flash_attention_forward", "_efficient_attention_forward"),
    *("flash_attn", "varlen_attn"),
)
# Of an operator's outputs one that only kept ones read: the experts' activations (their codes, in FP8).
READ_BY_KEPT = {"hf_moe::experts_up": 2, "hf_moe::fp8_experts_up": 2}
# In the path of a module whose products are not kept. Up-projections have a low rank and so cost little; an adapter's
# is as large as what it is added to. A dense MLP mostly ends its layer, and nothing needs its last product again.
AGAIN = {"q_b_proj", "kv_b_proj", "lora_B", "down_proj"}

Choice = Callable[[Callable, tuple, dict], bool]


@cache
def is_kept(operator: torch._ops.OpOverload) -> bool:
    name = operator.name()
    return name in PRODUCTS or any(part in name for part in ATTENTION)


@cache
def writes(operator: torch._ops.OperatorBase) -> bool:
    """Whether it writes to what it is given; an operator of higher order, as compiled code is, does not."""
    return isinstance(operator, torch._ops.OpOverload) and operator._schema.is_mutable


@cache
def place_of(argument: str, operator: torch._ops.OpOverload) -> int | None:
    """Where an operator has an argument of this name."""
    names = [x.name for x in operator._schema.arguments]
    return names.index(argument) if argument in names else None


def draws(operator: torch._ops.OpOverload, args: tuple, kwargs: dict) -> bool:
    """Whether it draws random numbers: were it not repeated, what draws after it would draw others than before."""
    place = place_of("dropout_p", operator)
    given = args[place] if place is not None and place < len(args) else kwargs.get("dropout_p")
    return bool(given)


def written(operator: torch._ops.OpOverload, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The tensors that an operator writes to."""
    given = dict(zip((x.name for x in operator._schema.arguments), args, strict=False)) | kwargs
    marked = (x.name for x in operator._schema.arguments if x.alias_info is not None and x.alias_info.is_write)
    return [given[name] for name in marked if isinstance(given.get(name), torch.Tensor)]


class Mode(TorchDispatchMode):
    """One that compiled code in a layer runs under, as flex attention is."""

    supports_higher_order_operators = True

    def __init__(self, choice: Choice, kept: deque):
        super().__init__()
        self.choice, self.kept = choice, kept

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True


class Keeping(Mode):
    """Around a forward: keeps what `choice` says, in order.

    What is written over later is copied before that, as a bias that Transformers adds to a grouped product in place.
    """

    def __init__(self, choice: Choice, kept: deque):
        super().__init__(choice, kept)
        self.places: dict[int, int] = {}  # storage -> where in `kept`

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.places and writes(operator):
            for tensor in written(operator, args, kwargs):
                self.copy(tensor)
        outputs = operator(*args, **kwargs)
        if self.choice(operator, args, kwargs):
            self.keep(operator, outputs)
        return outputs

    def keep(self, operator: torch._ops.OpOverload, outputs: Any) -> None:
        # Not the tensors themselves: autograd is about to tie them to the graph, which holds this.
        kept = tree_map_only(torch.Tensor, torch.Tensor.detach, outputs)
        if (unread := READ_BY_KEPT.get(operator.name())) is not None:
            kept = (*kept[:unread], kept[unread].new_empty(0), *kept[unread + 1 :])
        self.places.update(dict.fromkeys(storages_of(kept), len(self.kept)))
        self.kept.append(kept)

    def copy(self, tensor: torch.Tensor) -> None:
        place = self.places.pop(tensor.untyped_storage()._cdata, None)
        if place is not None:
            self.kept[place] = tree_map_only(torch.Tensor, torch.clone, self.kept[place])

    def storages(self) -> dict[int, torch.UntypedStorage]:
        """All that is kept, by storage."""
        return {number: storage for kept in self.kept for number, storage in storages_of(kept).items()}


def about_to_write(*tensors: torch.Tensor) -> None:
    """Before a kernel that torch does not see writes to them."""
    for mode in [] if torch.compiler.is_compiling() else _get_current_dispatch_mode_stack():
        if isinstance(mode, Keeping):
            for tensor in tensors:
                mode.copy(tensor)


class Giving(Mode):
    """Around the repetition: gives what was kept in place of computing it."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self.choice(operator, args, kwargs):
            return operator(*args, **kwargs)
        if not self.kept:
            raise RuntimeError("A layer under selective activation checkpointing can go back once, not twice.")
        return self.kept.popleft()


def storages_of(outputs: Any) -> dict[int, torch.UntypedStorage]:
    storages = (x.untyped_storage() for x in tree_leaves(outputs) if isinstance(x, torch.Tensor))
    return {storage._cdata: storage for storage in storages}


class Selective:
    """Makes the checkpointing of a model that has it enabled selective, from `begin` to `end`."""

    def __init__(self):
        self.handles, self.before = [], {}
        self.inside = 0  # how many modules of AGAIN

    def begin(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            if hasattr(module, "gradient_checkpointing"):
                # At each call: TRL enables checkpointing anew after each generation.
                self.handles.append(module.register_forward_pre_hook(self.choose))
            if not AGAIN.isdisjoint(name.split(".")):
                self.handles.append(module.register_forward_pre_hook(self.enter))
                # Also where the repetition ends inside, since it has all that was asked for.
                self.handles.append(module.register_forward_hook(self.leave, always_call=True))

    def end(self) -> None:
        while self.handles:
            self.handles.pop().remove()
        for module, checkpoint in self.before.items():
            module._gradient_checkpointing_func = checkpoint
        self.before.clear()

    def choose(self, module: nn.Module, args: tuple) -> None:
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is None or getattr(checkpoint, "keywords", {}).get("context_fn") == self.contexts:
            return
        self.before[module] = checkpoint
        module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, context_fn=self.contexts)

    def enter(self, module: nn.Module, args: tuple) -> None:
        self.inside += 1

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.inside -= 1

    def keeps(self, operator: torch._ops.OpOverload, args: tuple, kwargs: dict) -> bool:
        return not self.inside and is_kept(operator) and not draws(operator, args, kwargs)

    def contexts(self) -> tuple[Keeping, Giving]:
        """For one forward of a layer and its repetition."""
        kept = deque()
        return Keeping(self.keeps, kept), Giving(self.keeps, kept)
