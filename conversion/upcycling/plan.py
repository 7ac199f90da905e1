"""What an upcycling is going to do, checked as a whole before anything is written."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.activations import ACT2FN

from ...same_tokens import check_same_tokens
from ..files.hashing import file_digest
from ..files.source import Source
from ..files.tokenizer import load_tokenizer
from ..files.writer import Output
from ..options import UpcycleOptions
from . import UPCYCLERS
from .evidence import Evidence
from .layers import parse_layers
from .options import complete, refuse_unread
from .router_init import ROUTER_INITS
from .strategy import FeedForward, Layer, Request, Sizes, Strategy

FILES = ("prompts", "calibration")  # options that name one
DEFAULT_STRATEGY = UpcycleOptions.strategy


class Plan:
    """The strategy, the sizes and the router of each sparse layer.

    layers: index -> the strategy at work there. Raises a ValueError of one line for what cannot be done: unknown
    names, options that nothing reads, strategies that make unlike layers, sources that are no siblings.
    """

    def __init__(self, sources: Sequence[Source], options: UpcycleOptions):
        self.num_layers: int = sources[0].hf_moe_fields["num_hidden_layers"]
        self._names = chosen_strategies(options, self.num_layers)
        self._used = {name: UPCYCLERS[name] for name in sorted(set(self._names.values()))}
        self.strategy_names = ", ".join(self._used)
        dense_config = sources[0].hf_moe_config(mlp_layer_types=["dense"] * self.num_layers)
        self._dense = [source.outputs(dense_config) for source in siblings(sources)]

        given = options.given
        self._requests = self._asked_of_strategies(options, given, len(sources))
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
        self.sizes, self.exact = self._agreed_sizes()

        evidence = Evidence(
            sources[0].checkpoint.folder, dense_config, self._dense[0], options.calibration, options.prompts
        )
        if evidence.prompts and len(evidence.prompts) != options.experts:
            raise ValueError(f"prompts ({len(evidence.prompts)}) must be as many as experts ({options.experts}).")
        act_fn = ACT2FN[dense_config.hidden_act]
        self.memory = evidence.memory  # bytes that are needed before the first tensor is made
        self.layers: dict[int, Strategy] = {}
        for index, name in sorted(self._names.items()):
            networks = [feed_forward(outputs, index) for outputs in self._dense]
            layer = Layer(index, networks, act_fn, evidence, options.seed, dense_config.hidden_size)
            self.layers[index] = self._used[name](self._requests[name], layer)
        said = {"experts": options.experts, "top_k": options.top_k, "layers": options.layers}
        self.arguments = said | self._described()

    def _asked_of_strategies(self, options: UpcycleOptions, given: Mapping, sources: int) -> dict[str, Request]:
        """What each strategy at work is to make."""
        down = self._dense[0]["model.layers.0.mlp.down_proj.weight"]
        for name, output in self._dense[0].items():
            if ".mlp." in name and output.dtype != down.dtype:
                raise ValueError(
                    f"{name} is {output.dtype}, but {down.name} is {down.dtype}: save the feed-forward networks in "
                    "one dtype first."
                )
        requests = {}
        for name, made in self._used.items():
            if sources > 1 and not made.takes_siblings:
                raise ValueError(f"strategy {name!r} takes 1 source, not {sources}; 'merge' takes several.")
            own = complete(made.options, given, f"strategy {name!r}")
            requests[name] = Request(options.experts, options.top_k, down.shape[1], down.dtype, sources, own)
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

    def _agreed_sizes(self) -> tuple[Sizes, bool]:
        """The sizes that all strategies make, and whether all of them keep the function."""
        sizes = {name: made.sizes(self._requests[name]) for name, made in self._used.items()}
        (first, agreed), *others = sizes.items()
        for name, said in others:
            if said.config_fields() != agreed.config_fields():
                raise ValueError(
                    f"Strategies {first!r} and {name!r} cannot share a model, whose layers have one size: "
                    f"{agreed.config_fields()} against {said.config_fields()}."
                )
        exact = True
        for name, said in sizes.items():
            request, start = self._requests[name], self._router_inits[name]
            uniform = ROUTER_INITS[start].uniform
            if uniform and said.tied > 1 and request.top_k < request.experts:
                raise ValueError(
                    f"router_init {start!r} cannot tell whole networks apart, so with granularity a token would meet "
                    "pieces of several; use router_init 'normal'."
                )
            exact &= said.exact and (uniform or not said.needs_uniform_router)
        return agreed, exact

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
        return made.rest(next(iter(self._requests.values())), [outputs[name] for outputs in self._dense])

    def router(self, strategy: Strategy) -> torch.Tensor:
        """The router's weights in a layer, [E, D] float32: experts that are tied have the same row."""
        start = self._router_inits[self._names[strategy.layer.index]]
        rows = ROUTER_INITS[start].rows(strategy, self._router_options[start])
        return rows.repeat_interleave(self.sizes.tied, dim=0)


def chosen_strategies(options: UpcycleOptions, num_layers: int) -> dict[int, str]:
    """Layer -> its strategy. Raises a ValueError for a name that is unknown, or has no effect."""
    names = parse_layers(options.layers, num_layers, options.strategy)
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


def siblings(sources: Sequence[Source]) -> Sequence[Source]:
    """The sources, each the first one's model with other weights. Raises a ValueError that names what differs."""
    first = sources[0]
    for source in sources[1:]:
        if source.family is not first.family:
            raise ValueError(
                f"{source.name} is a {source.family.model_type}, {first.name} a {first.family.model_type}: "
                "experts are merged from siblings of one model."
            )
        for name, value in first.hf_moe_fields.items():
            if source.hf_moe_fields[name] != value:
                raise ValueError(
                    f"{source.name} has {name}={source.hf_moe_fields[name]!r}, {first.name} has {value!r}: experts "
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


def check_tokenizers(sources: Sequence[Source]) -> None:
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
            sources[0].hf_moe_fields["vocab_size"],
            "experts are merged from siblings of one model, which read the same ids.",
        )


def feed_forward(outputs: Mapping[str, Output], layer: int) -> FeedForward:
    prefix = f"model.layers.{layer}.mlp."
    return FeedForward({n.removeprefix(prefix): output for n, output in outputs.items() if n.startswith(prefix)})
