"""What an upcycling is going to do, checked as a whole before anything is written."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...same_tokens import check_same_tokens
from ..files.graft_source import GraftSource
from ..files.hashing import file_digest
from ..files.source import Source
from ..files.tokenizer import load_tokenizer
from ..files.writer import Output
from ..options import UpcycleOptions
from . import UPCYCLERS
from .dense import GraftDense, NativeDense
from .evidence import Evidence
from .layers import parse_layers
from .options import complete, refuse_unread
from .router_init import ROUTER_INITS
from .strategy import Layer, Request, Sizes, Strategy

FILES = ("prompts", "calibration")  # options that name one
DEFAULT_STRATEGY = UpcycleOptions.strategy


class Plan:
    """The strategy, the sizes and the router of each sparse layer.

    layers: index -> the strategy at work there. Raises a ValueError of one line for what cannot be done: unknown
    names, options that nothing reads, strategies that make unlike layers, sources that are no siblings.
    """

    def __init__(self, sources: Sequence[Source | GraftSource], options: UpcycleOptions):
        self.kind = GraftDense if isinstance(sources[0], GraftSource) else NativeDense
        self._dense = [self.kind(source) for source in siblings(sources)]
        self.dense = self._dense[0]
        self._names = chosen_strategies(options, self.dense.layers)
        self._used = {name: UPCYCLERS[name] for name in sorted(set(self._names.values()))}
        self.strategy_names = ", ".join(self._used)
        self._networks = {layer: [dense.feed_forward(layer) for dense in self._dense] for layer in sorted(self._names)}

        given = options.given
        self._layer_requests = self._asked_of_strategies(options, given, len(sources))
        self._requests = {name: self._layer_requests[layer] for layer, name in reversed(self._names.items())}
        self._router_inits = {
            name: options.router_init or made.router_init(self._requests[name]) for name, made in self._used.items()
        }
        self._refuse_unread(given)
        self._router_options = {
            start: complete(ROUTER_INITS[start].options, given, f"router_init {start!r}")
            for start in sorted(set(self._router_inits.values()))
        }
        std = given.get("router_std", 0.0)
        if not 0 <= std < math.inf:
            raise ValueError(f"router_std ({std}) must be finite and not negative.")
        self.sizes, self.widths, self.exact = self._agreed_sizes()

        evidence = Evidence(self.dense, options.calibration, options.prompts)
        if evidence.prompts and len(evidence.prompts) != options.experts:
            raise ValueError(f"prompts ({len(evidence.prompts)}) must be as many as experts ({options.experts}).")
        self.memory = evidence.memory  # bytes that are needed before the first tensor is made
        self.layers: dict[int, Strategy] = {}
        for index, networks in self._networks.items():
            act_fn = self.dense.act_fn(index)
            layer = Layer(index, networks, act_fn, evidence, options.seed, self.dense.hidden_size)
            self.layers[index] = self._used[self._names[index]](self._layer_requests[index], layer)
        said = {"experts": options.experts, "top_k": options.top_k, "layers": options.layers}
        self.arguments = said | self._described()

    def _asked_of_strategies(self, options: UpcycleOptions, given: Mapping, sources: int) -> dict[int, Request]:
        """What the strategy of each layer is to make."""
        first = next(iter(self._networks.values()))[0].output("down_proj.weight")
        own = {}
        for name, made in self._used.items():
            if sources > 1 and not made.takes_siblings:
                raise ValueError(f"strategy {name!r} takes 1 source, not {sources}; 'merge' takes several.")
            own[name] = complete(made.options, given, f"strategy {name!r}")
        requests = {}
        for layer, (network, *_) in self._networks.items():
            for part in network:
                if network.output(part).dtype != first.dtype:
                    raise ValueError(
                        f"{network.output(part).name} is {network.output(part).dtype}, but {first.name} is "
                        f"{first.dtype}: save the feed-forward networks in one dtype first."
                    )
            width, said = network.output("down_proj.weight").shape[1], own[self._names[layer]]
            requests[layer] = Request(options.experts, options.top_k, width, first.dtype, sources, said)
        return requests

    def _refuse_unread(self, given: Mapping[str, Any]) -> None:
        """Raises a ValueError for an option that neither a strategy nor a start of the routers at work reads."""
        readers = {}
        for name, start in self._router_inits.items():
            readers[f"strategy {name!r}"] = self._used[name].options
            readers[f"router_init {start!r}"] = ROUTER_INITS[start].options
        everyone = {f"strategy {name!r}": made.options for name, made in UPCYCLERS.items()}
        everyone |= {f"router_init {name!r}": made.options for name, made in ROUTER_INITS.items()}
        refuse_unread(given, readers, everyone)

    def _agreed_sizes(self) -> tuple[Sizes, dict[str, int | list[int]], bool]:
        """The sizes of the first layer, the config's fields of all, and whether all strategies keep the function.

        Layers have one size, but for widths in a graft, which are those of the layers' own networks.
        """
        sizes = {layer: self._used[name].sizes(self._layer_requests[layer]) for layer, name in self._names.items()}
        fields = {layer: said.config_fields() for layer, said in sorted(sizes.items())}
        (first, agreed), *others = fields.items()
        widths = [name for name in agreed if name.endswith("intermediate_size")] if self.kind is GraftDense else []
        for layer, said in others:
            if {**said, **{name: agreed[name] for name in widths if name in said}} != agreed:
                one, other = sorted([self._names[first], self._names[layer]])
                raise ValueError(
                    f"Strategies {one!r} and {other!r} cannot share a model, whose layers have one size: {agreed} "
                    f"against {said}."
                )
        for name in widths:
            of_layers = [said[name] for said in fields.values()]
            agreed = agreed | {name: of_layers if len(set(of_layers)) > 1 else of_layers[0]}
        exact = True
        for layer, said in sizes.items():
            request, start = self._layer_requests[layer], self._router_inits[self._names[layer]]
            uniform = ROUTER_INITS[start].uniform
            if uniform and said.tied > 1 and request.top_k < request.experts:
                raise ValueError(
                    f"router_init {start!r} cannot tell whole networks apart, so with granularity a token would meet "
                    "pieces of several; use router_init 'normal'."
                )
            why, cut = self.dense.needs_whole(layer), said.moe_intermediate_size != request.width
            if why and (cut or said.n_shared_experts):
                raise ValueError(
                    f"strategy {self._names[layer]!r} makes experts of another form than the network's, but {why}: "
                    "use copy or noise, without granularity."
                )
            exact &= said.exact and (uniform or not said.needs_uniform_router)
        return sizes[first], agreed, exact

    def _described(self) -> dict[str, Any]:
        """The options in force, files by name and digest."""
        said: dict[str, Any] = {"router_init": ", ".join(self._router_options)}
        for options in [*(r.options for r in self._requests.values()), *self._router_options.values()]:
            said |= {name: value for name, value in options.items() if value is not None}
        for name in FILES:
            if name in said:
                path = Path(said[name])
                said[name] = {"file": path.name, "sha256": file_digest(path)}
        if "domain_texts" in said:
            said["domain_texts"] = [Path(text).name for text in said["domain_texts"]]
        return said

    def rest(self, name: str) -> Output:
        """A tensor outside the sparse layers."""
        made = next(iter(self._used.values()))
        return made.rest(next(iter(self._requests.values())), [dense.outputs[name] for dense in self._dense])

    def router(self, strategy: Strategy) -> torch.Tensor:
        """The router's weights in a layer, [E, D] float32: experts that are tied have the same row."""
        start = self._router_inits[self._names[strategy.layer.index]]
        rows = ROUTER_INITS[start].rows(strategy, self._router_options[start])
        return rows.repeat_interleave(self.sizes.tied, dim=0)


def chosen_strategies(options: UpcycleOptions, layers: Sequence[int]) -> dict[int, str]:
    """Layer -> its strategy. Raises a ValueError for a name that is unknown, or has no effect."""
    names = parse_layers(options.layers, layers, options.strategy)
    for name in [options.strategy, *names.values()]:
        known("strategy", name, UPCYCLERS)
    if options.strategy not in names.values() and options.strategy != DEFAULT_STRATEGY:
        raise ValueError(
            f"strategy {options.strategy!r} has no effect: layers {options.layers!r} names others for all."
        )
    if options.router_init is not None:
        known("router_init", options.router_init, ROUTER_INITS)
    return names


def known(what: str, name: str, registry: Mapping[str, Any]) -> None:
    if name not in registry:
        raise ValueError(f"{what} {name!r} is unknown; it can be {', '.join(registry)}.")


def siblings(sources: Sequence[Source | GraftSource]) -> Sequence[Source | GraftSource]:
    """The sources, each the first one's model with other weights. Raises a ValueError that names what differs."""
    first = sources[0]
    for source in sources[1:]:
        if source.model_type != first.model_type:
            raise ValueError(
                f"{source.name} is a {source.model_type}, {first.name} a {first.model_type}: "
                "experts are merged from siblings of one model."
            )
        for name, value in first.decisive.items():
            if source.decisive.get(name) != value:
                raise ValueError(
                    f"{source.name} has {name}={source.decisive.get(name)!r}, {first.name} has {value!r}: experts "
                    "are merged from siblings of one model."
                )
        for name, entry in source.checkpoint.entries.items():
            if name in first.checkpoint.entries and entry.dtype != first.checkpoint.entries[name].dtype:
                raise ValueError(
                    f"{name} is {entry.dtype} in {source.name}, but {first.checkpoint.entries[name].dtype} in "
                    f"{first.name}; save them in one dtype first."
                )
    check_tokenizers(sources)
    return sources


def check_tokenizers(sources: Sequence[Source | GraftSource]) -> None:
    """Raises a ValueError where an id means another token in one of the sources than in the first.

    Says which have no tokenizer, or no chat template, to tell.
    """
    if len(sources) == 1:
        return
    tokenizers = [load_tokenizer(source.checkpoint.folder) for source in sources]
    lacking = {"tokenizer": [tokenizer is None for tokenizer in tokenizers]}
    lacking["chat template"] = [getattr(tokenizer, "chat_template", None) is None for tokenizer in tokenizers]
    for what, absent in lacking.items():
        if any(absent) and not all(absent):
            names = ", ".join(source.name for source, lacks in zip(sources, absent, strict=True) if lacks)
            print(f"{names}: no {what} to compare with the others'", file=sys.stderr)
    known = [(source, tokenizer) for source, tokenizer in zip(sources, tokenizers, strict=True) if tokenizer]
    for source, tokenizer in known[1:]:
        check_same_tokens(
            known[0][1],
            tokenizer,
            (known[0][0].name, source.name),
            sources[0].vocab_size,
            "experts are merged from siblings of one model, which read the same ids.",
        )
