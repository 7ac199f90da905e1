"""What a router computes, found out by asking it: a few random tokens through its layer, whose experts stand still.

A layer of Transformers calls its experts with hidden states, indices and weights. Which function of the logits those
weights are, and which of the layer's tensors moves the choice and not the logits, follows from a call or two. Nothing
stays changed: no gradient, no random state, no hook, no tensor.

Shapes: T tokens, D hidden size, E routed experts, K experts per token.
"""

import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ..model.routing import sigmoid_affinity, softmax_affinity, sqrt_softplus_affinity

TOKENS = 32
TOLERANCE = 1e-4  # of a weight, relative
TOP_K = ("top_k", "num_experts_per_tok")  # what layers call K
LIFTED, FAR = 1, 1e3  # an expert, and a bias beyond any score, with which it is chosen


# Candidates: of two that differ by a factor a token, as softmax and exp, only one is here.
AFFINITIES = {"softmax": softmax_affinity, "sigmoid": sigmoid_affinity, "sqrt_softplus": sqrt_softplus_affinity}


def itself(scores_TE: torch.Tensor) -> torch.Tensor:
    return scores_TE


# model_type -> the scores that its paper or release trains by, and whether weights are divided by their sum, where no
# call of experts shows them: JetMoE has none, Llama 4 weighs the experts' input, PhiMoE's SparseMixer masks the logits
# first, Gemma 4 records probabilities, which each expert scales by a weight of its own, ZAYA may skip every token.
KNOWN = {
    "gemma4_text": (itself, True),
    "jetmoe": (softmax_affinity, True),
    "llama4_text": (sigmoid_affinity, False),
    "phimoe": (softmax_affinity, False),
    "zaya": (softmax_affinity, False),
}
# Where Transformers keeps selection biases, by the last part of their names.
BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")


class Found(NamedTuple):
    """Of a router: `affinity`, logits [T, E] to scores [T, E], None where it could not be established, for a `reason`;
    whether the chosen scores are divided by their sum, to be weights; the selection bias's name within the layer; what
    weights are multiplied by besides, None where no call of experts showed that."""

    affinity: Callable[[torch.Tensor], torch.Tensor] | None = None
    normalized: bool = False
    bias: str | None = None
    reason: str = ""
    scale: float | None = None


class Call(NamedTuple):
    """What one call of a layer showed."""

    logits_TE: torch.Tensor
    index_TK: torch.Tensor
    weights_TK: torch.Tensor


FOUND: "WeakKeyDictionary[nn.Module, Found]" = WeakKeyDictionary()


def probed(layer: nn.Module, router: nn.Module, place: int, config) -> Found:
    """What the `router` in `layer` computes; its logits are at `place` of its output. Asked once."""
    if router not in FOUND:
        FOUND[router] = probe(layer, router, place, config)
    return FOUND[router]


def probe(layer: nn.Module, router: nn.Module, place: int, config) -> Found:
    try:
        with standing_still(layer), gathered(layer), in_float32(layer), spread(router), choosing_two(layer):
            first = call(layer, router, place, config)
            bias = find_bias(layer, router, place, config, first)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, StopIteration) as error:
        # Layers are as many as their authors: what cannot be called so is told by the table, or said.
        said = " ".join(str(error).split()) or type(error).__name__
        return known(config)._replace(bias=bias_by_name(layer), reason=f"its layer cannot be tried: {said}")
    first = Call(*(x[(first.weights_TK != 0).all(dim=-1)] for x in first))  # ZAYA's weight of 0 is of no expert
    tried = {name: explains(affinity, first) for name, affinity in AFFINITIES.items()}
    fits = {name: factors_T for name, factors_T in tried.items() if factors_T is not None}
    if len(fits) == 1:
        ((name, factors_T),) = fits.items()
        normalized = not same(factors_T)
        scales_T = first.weights_TK.float().sum(dim=-1) if normalized else factors_T
        scale = round(scales_T.mean().item(), 4) if same(scales_T) else None
        return Found(AFFINITIES[name], normalized, bias, scale=scale)
    reason = f"fit {' and '.join(fits)}" if fits else f"are explained by none of {', '.join(AFFINITIES)}"
    return known(config)._replace(bias=bias, reason=f"its experts' weights {reason}")


def known(config) -> Found:
    """What KNOWN says of a model's scores."""
    return Found(*KNOWN.get(getattr(config, "model_type", None), ()))


def explains(affinity: Callable[[torch.Tensor], torch.Tensor], seen: Call) -> torch.Tensor | None:
    """The factor between a token's scores and its weights [T]; None where it is not one."""
    scores_TK = affinity(seen.logits_TE.float()).gather(-1, seen.index_TK)
    factors_TK = seen.weights_TK.float() / scores_TK
    if (
        not len(factors_TK) or not factors_TK.isfinite().all() or factors_TK.shape[1] == 1
    ):  # one weight that may be normalised says nothing
        return None
    within = TOLERANCE * factors_TK.abs().max()
    return factors_TK[:, 0] if (factors_TK - factors_TK[:, :1]).abs().max() <= within else None


def same(values_T: torch.Tensor) -> bool:
    return bool((values_T - values_T[0]).abs().max() <= TOLERANCE * values_T.abs().max())


def find_bias(layer: nn.Module, router: nn.Module, place: int, config, before: Call) -> str | None:
    """The tensor of the layer that moves the choice and leaves the logits."""
    experts = before.logits_TE.shape[-1]
    own = [*layer.named_parameters(), *layer.named_buffers()]
    for name, tensor in own:
        if name.startswith("experts.") or tensor.numel() != experts or not tensor.is_floating_point():
            continue
        with changed(tensor) as values:
            values.view(-1)[LIFTED] += FAR
            after = call(layer, router, place, config)
        moved = bool((after.index_TK == LIFTED).any(dim=-1).all())
        if moved and torch.equal(after.logits_TE, before.logits_TE):
            return name
    return None


def bias_by_name(layer: nn.Module) -> str | None:
    names = [name for name, _ in (*layer.named_parameters(), *layer.named_buffers())]
    return next((name for name in names if name.rpartition(".")[2] in BIASES), None)


# ---- one call ----


def call(layer: nn.Module, router: nn.Module, place: int, config) -> Call:
    """The layer on random tokens."""
    weight = next(x for x in router.parameters() if x.is_floating_point() and x.dim() > 1)
    generator = torch.Generator("cpu").manual_seed(0)
    hidden = torch.randn(1, TOKENS, config.hidden_size, generator=generator, device="cpu").to(
        weight.device, weight.dtype
    )
    given = {}
    if "input_ids" in inspect.signature(layer.forward).parameters:
        ids = torch.randint(config.vocab_size, (1, TOKENS), generator=generator)
        given["input_ids"] = ids.to(weight.device)
    with watched(router, layer.experts) as seen:
        layer(hidden, **given)
    output = seen["router"] if isinstance(seen["router"], tuple) else (seen["router"],)
    tensors = [x for x in seen["experts"] if isinstance(x, torch.Tensor) and x.dim() > 1]
    index = next(x for x in tensors if not x.is_floating_point()).flatten(0, -2)
    weights = next(x for x in tensors[1:] if x.is_floating_point() and x.shape[-1] == index.shape[-1]).flatten(0, -2)
    return Call(output[place].flatten(0, -2), index, weights)


@contextmanager
def watched(router: nn.Module, experts: nn.Module) -> Iterator[dict]:
    """What the router answers and the experts are given, which answer zeros."""
    seen = {}

    def stand_still(*args, **kwargs):
        seen["experts"] = (*args, *kwargs.values())
        return torch.zeros_like(seen["experts"][0])

    handle = router.register_forward_hook(lambda module, args, output: seen.update(router=output))
    own = vars(experts).get("forward")
    experts.forward = stand_still
    try:
        yield seen
    finally:
        handle.remove()
        if own is None:
            del experts.forward
        else:
            experts.forward = own


@contextmanager
def standing_still(layer: nn.Module) -> Iterator[None]:
    """No gradient, no noise of training, and none of the hooks that are there."""
    modules = list(layer.modules())
    training = [module.training for module in modules]
    hooks = [(module._forward_hooks, module._forward_pre_hooks) for module in modules]
    with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        try:
            for module in modules:
                module.training = False
                module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
            yield
        finally:
            for module, was, (after, before) in zip(modules, training, hooks, strict=True):
                module.training, module._forward_hooks, module._forward_pre_hooks = was, after, before


def gathered(layer: nn.Module) -> AbstractContextManager:
    """Whole weights under DeepSpeed's ZeRO-3, but for the experts'."""
    parts = [x for name, x in layer.named_parameters() if hasattr(x, "ds_id") and not name.startswith("experts.")]
    if not parts:
        return nullcontext()
    from deepspeed.zero import GatheredParameters

    return GatheredParameters(parts)


@contextmanager
def in_float32(layer: nn.Module) -> Iterator[None]:
    """Weights of 16 bits but the experts' as float32: rounded, scores and weights would not tell which function."""
    parts = [*layer.named_parameters(), *layer.named_buffers()]
    halves = [x for name, x in parts if not name.startswith("experts.") and x.dtype in (torch.bfloat16, torch.float16)]
    values = [x.data for x in halves]
    try:
        for tensor in halves:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, before in zip(halves, values, strict=True):
            tensor.data = before


@contextmanager
def choosing_two(layer: nn.Module) -> Iterator[None]:
    """A layer that chooses one expert chooses two: a single weight that is normalised would say nothing."""
    ones = [(part, name) for part in layer.modules() for name in TOP_K if vars(part).get(name) == 1]
    for part, name in ones:
        setattr(part, name, 2)
    try:
        yield
    finally:
        for part, name in ones:
            setattr(part, name, 1)


@contextmanager
def changed(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensor's values, to be changed in place; afterwards they are as they were."""
    before = tensor.detach().clone()
    try:
        yield tensor.data
    finally:
        tensor.data.copy_(before)


@contextmanager
def spread(router: nn.Module) -> Iterator[None]:
    """Another router's weights, and table of hashes, for the call where they are all zero, as some are drawn.

    Those treat all experts alike, whatever the scores.
    """
    matrices = [x for x in (*router.parameters(), *router.buffers()) if x.dim() == 2]
    experts = next(len(x) for x in matrices if x.is_floating_point())
    generator = torch.Generator("cpu").manual_seed(1)
    with ExitStack() as stack:
        for tensor in matrices:
            if not tensor.any():
                values = stack.enter_context(changed(tensor))
                places = torch.arange(values.numel()).view(values.shape) % experts
                drawn = torch.rand(values.shape, generator=generator, device="cpu") - 0.5
                values.copy_(drawn if values.is_floating_point() else places)
        yield
