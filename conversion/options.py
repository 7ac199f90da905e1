"""What can be said of a conversion: dataclasses, whose fields are the keywords of a function.

The commands of the same names have these options, too (`progress` apart): tests/cli/test_options.py.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

# Of an upcycling, what only some strategies and router starts read; None where it is not given.
READ_BY_SOME = (
    "granularity",
    "shared",
    "carved",
    "noise_scale",
    "drop_ratio",
    "rest",
    "domain_texts",
    "router_std",
    "prompts",
    "calibration",
)


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """How any conversion writes.

    max_shard_size: of a file of weights, bytes or a text such as "5GB". dry_run: plan and report, write nothing.
    resume: go on with what an interrupted call has written. verify: compare the logits with the source's, by
    Transformers' own class where the model is not hf_moe's; refused where there is none. progress: show a bar.
    """

    max_shard_size: int | str = "5GB"
    dry_run: bool = False
    resume: bool = False
    verify: bool = True
    progress: bool = True


@dataclass(frozen=True, kw_only=True)
class ImportOptions(ConversionOptions):
    """ConversionOptions, and drop_mtp: leave out DeepSeek-V3's layers for multi-token prediction."""

    drop_mtp: bool = False


@dataclass(frozen=True, kw_only=True)
class ExportOptions(ConversionOptions):
    """ConversionOptions, and what to write.

    to: a key of `FAMILIES`. layout: "per-expert" (a tensor for each expert and projection) or "fused" (tensors of all
    experts), where the family has both; None: as its models were released, which vLLM's loaders and llama.cpp's
    converter read. drop_mtp: leave out the layers for multi-token prediction. exported_base: of an adapter, the folder
    or Hub id of its base, exported alike, for its config to name.
    """

    to: str
    layout: str | None = None
    drop_mtp: bool = False
    exported_base: str | None = None


@dataclass(frozen=True, kw_only=True)
class UpcycleOptions(ConversionOptions):
    """ConversionOptions, and what the mixture is to be.

    experts, top_k: feed-forward networks in each sparse layer, and how many of them a token meets; with "split" and
    "carve" the pieces of one. strategy: a key of `UPCYCLERS`; their files say what each does. layers: which become
    sparse, counted from 0: "all", "all/2" for every second, "2-5,8", or "0-3=copy,4-7=drop" with strategies of their
    own. graft: keep the model's own architecture, with experts in it, also where hf_moe's own could hold it; other
    models are always grafted. trust_remote_code: run the model code that lies beside the checkpoint, of a model that
    Transformers does not know; the code goes along. router_init: a key of `ROUTER_INITS`; by default what the strategy
    calls for. seed: of all that is drawn.

    Of the rest, one that nothing reads is refused. granularity: cut each network into so many experts. shared: shared
    experts, 1 where the strategy has some. router_std: root mean square of the router's weights (0.02); they are
    worked out in fp32 from `seed`, then rounded to the checkpoint's dtype. prompts: a YAML or JSON list with the
    prompts of each expert. calibration: a file or a folder of text or rows, or a data set's name on the Hub, that the
    dense model reads, in memory, before the conversion. carved, noise_scale, drop_ratio, rest, domain_texts: see the
    strategies.
    """

    experts: int
    top_k: int
    strategy: str = "copy"
    granularity: int = 1
    shared: int | None = None
    carved: bool = False
    noise_scale: float | None = None
    drop_ratio: float | None = None
    rest: str | int | None = None
    domain_texts: Sequence[str | Path] | None = None
    layers: str = "all"
    graft: bool = False
    trust_remote_code: bool = False
    router_init: str | None = None
    router_std: float | None = None
    prompts: str | Path | None = None
    calibration: str | Path | None = None
    seed: int = 0

    @property
    def given(self) -> dict[str, Any]:
        """What is said of READ_BY_SOME."""
        defaults = {field.name: field.default for field in fields(self)}
        return {name: getattr(self, name) for name in READ_BY_SOME if getattr(self, name) != defaults[name]}


def takes(options: type) -> Callable[[Callable], Callable[..., dict[str, Any]]]:
    """A decorator: the function's last argument, `options`, is given to it as keywords, one for each field.

    Raises ValueError for a keyword that is no field.
    """

    def decorate(function: Callable) -> Callable[..., dict[str, Any]]:
        places = list(inspect.signature(function).parameters.values())[:-1]
        keywords = [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if field.default is MISSING else field.default,
                annotation=field.type,
            )
            for field in fields(options)
        ]
        shown = inspect.signature(function).replace(parameters=[*places, *keywords])

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> dict[str, Any]:
            for name, value in kwargs.items():
                if name not in shown.parameters:
                    raise ValueError(f"{name} ({value}) has no effect: nothing reads it.")
            given = shown.bind(*args, **kwargs).arguments
            said = {field.name: given.pop(field.name) for field in fields(options) if field.name in given}
            return function(**given, options=options(**said))

        call.__signature__ = shown
        return call

    return decorate
