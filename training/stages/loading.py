"""The model of a run and its tokenizer, loaded as the arguments say, and what of it trains."""

import json
import os
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig

import hf_moe  # noqa: F401  (the Auto classes learn "hf_moe")
from hf_moe.generation_settings import check_generation_config, mended_config
from hf_moe.loading import base_of
from hf_moe.model.router_code import HfMoeRouterCode
from hf_moe.model.routing import ROUTERS
from hf_moe.reading import auto_config, auto_tokenizer, built, whole_model

from ..host import CLIPS_EXPERT_PARALLEL, is_adapter, sharding
from ..output.saved_dtype import DTYPES, SAVED, check_saved
from ..trainers.refusals import leave_out_routing
from ..trainers.sharded import policy_of
from ..weights.alignment import align
from ..weights.float8 import check_float8, compute_in_float8
from ..weights.fp8 import OURS as EXPERTS_OF_FP8
from ..weights.fp8 import check_fp8, check_sizes, compute_in_fp8
from ..weights.groups import GROUPS, train_group
from .fastest import take_fastest
from .names import STAGES

OF_ROUTER = r"\.gate\.\w+$"


@dataclass
class ModelArguments:
    """Which stage, which model, and how to load it (`trust_remote_code` is the trainer's own argument)."""

    stage: str = field(
        default="sft",
        metadata={"help": "What kind of training this is; each has its own arguments.", "choices": list(STAGES)},
    )
    plugins: list[str] | None = field(
        default=None,
        metadata={"help": "Python files of yours that are run first: they register routers and the like."},
    )
    model_name_or_path: str | None = field(default=None, metadata={"help": "Folder of a checkpoint, or its Hub id."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a Hub checkpoint."})
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Type of the weights; `bf16` then computes in bfloat16 over float32 weights.",
            "choices": list(DTYPES),
        },
    )
    save_dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the weights of the whole model that is saved in the end, its average's and ESFT's merged "
            "one's, too; auto: the source's; fp8: float8 in blocks of 128 x 128, as DeepSeek-V3 is released. "
            "Checkpoints, adapters and trained rows stay as they train.",
            "choices": list(SAVED),
        },
    )
    trainable: str = field(
        default="all",
        metadata={
            "help": "Which parameters train; the others get no gradient and no optimizer state. The selection bias "
            "of a frozen router stands still, too, unless router_bias_update_speed is given.",
            "choices": list(GROUPS),
        },
    )
    router_type: str | None = field(
        default=None,
        metadata={"help": "Another router for an hf_moe model, by its name in ROUTERS; what it adds is drawn."},
    )
    router_args: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "The arguments of the router, as router_args in a configuration."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "sdpa, eager, flash_attention_2, flex_attention, varlen; default: the fastest that is right."
        },
    )
    experts_implementation: str | None = field(
        default=None,
        metadata={"help": "auto, hf_moe, grouped_mm, eager; default: the fastest on a GPU, else the model's own."},
    )
    float8: bool = field(
        default=False,
        metadata={"help": "Multiply linear layers in float8, by torchao, beside bf16. Needs compute capability 8.9."},
    )
    fp8: bool = field(
        default=False,
        metadata={
            "help": "Multiply experts and linear layers in FP8 as DeepSeek-V3 was trained, with a scale for each 128 "
            "numbers or 128 x 128, beside bf16. Needs compute capability 9.0."
        },
    )
    expert_parallel_size: int = field(
        default=1,
        metadata={
            "help": "Over how many processes the experts of a layer are split; all else is sharded over all of them. "
            "Start with --accelerate expert_parallel."
        },
    )


def load_tokenizer(
    source: str, model_args: ModelArguments, args: TrainingArguments, name: str = "model_name_or_path"
) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model that the argument `name` gives.

    Raises FileNotFoundError for an absent folder, ValueError if nothing loads, or if that model is an adapter.
    """
    path = Path(source)
    if source == model_args.model_name_or_path and base_of(source) is not None:
        raise not_whole(source)
    if not path.is_dir() and (path.is_absolute() or source.startswith(".") or source.count("/") > 1):
        raise FileNotFoundError(f"{name}: there is no folder {source}.")
    what = "has no tokenizer that loads" if path.is_dir() else "is no folder here and could not be had from the Hub"
    return auto_tokenizer(
        source,
        f"{name} {source} {what}",
        revision=model_args.model_revision,
        trust_remote_code=args.trust_remote_code,
    )


def load_trained_model(source: str, model_args: ModelArguments, args: TrainingArguments) -> PreTrainedModel:
    """The model in `source`, loaded as the arguments say.

    Raises ValueError where they need a package that is not there, or say a thing twice, or where it is an adapter.
    """
    check_products(source, model_args, args)
    given = {
        "dtype": model_args.dtype,
        "revision": model_args.model_revision,
        "trust_remote_code": args.trust_remote_code,
        **implementations(model_args),
        **expert_parallel(model_args.expert_parallel_size),
    }
    further = args.model_init_kwargs or {}
    for name in sorted(given.keys() & further.keys()):
        option = {"revision": "model_revision", "distributed_config": "expert_parallel_size"}.get(name, name)
        raise ValueError(f"model_init_kwargs holds {name}, for which there is --{option}: say it there alone.")
    if model_args.expert_parallel_size > 1 and args.device.type == "cuda" and "experts_implementation" not in further:
        given.setdefault("experts_implementation", "auto")  # as `choose_fastest` will: experts are sharded by it
    in_bf16 = sharding(partial(policy_of, device=args.device.type)) if args.bf16 else nullcontext()
    try:
        with in_bf16:
            config = right_config(source, model_args, args)
            drawn = OF_ROUTER if model_args.router_type is not None else None
            model = whole_model(source, **config, drawn=drawn, **given, **further)
    except ImportError as error:  # of attn_implementation and the like
        raise ValueError(" ".join(str(error).split())) from error
    if is_adapter(model):  # saving would write the adapter alone, and lose what its base has learnt
        raise not_whole(source)
    args.model_init_kwargs = None  # used
    leave_out_routing(model, args)
    if args.device.type == "cpu":
        align(model)
    say_new_positions(model, args)
    choose_fastest(model, model_args, args, further)
    choose_products(model, model_args)
    return model


def check_products(source: str, model_args: ModelArguments, args: TrainingArguments) -> None:
    """Before the model in `source` is loaded: raises ValueError where it cannot be computed, or saved, in float8."""
    if model_args.float8:
        check_float8(args.device)
    if model_args.float8 and model_args.fp8:
        raise ValueError("fp8 and float8 are both true, and multiply the same layers: leave one of them out.")
    if not model_args.fp8 and model_args.save_dtype != "fp8":
        return
    config = auto_config(source, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code)
    check_saved(config, model_args.save_dtype)
    if not model_args.fp8:
        return
    if (experts := model_args.experts_implementation) not in EXPERTS_OF_FP8:
        raise ValueError(f"fp8 is true and experts_implementation {experts}, which has no FP8: leave one of them out.")
    check_fp8(args.device)
    with torch.device("meta"):
        what = f"{source} cannot be built"
        check_sizes(built(AutoModelForCausalLM.from_config, what, config, trust_remote_code=args.trust_remote_code))


def choose_products(model: PreTrainedModel, model_args: ModelArguments) -> None:
    """Let the model multiply in float8 or in FP8 if the arguments say so, and say what does."""
    if model_args.float8:
        print(compute_in_float8(model), file=sys.stderr)
    if model_args.fp8:
        print(compute_in_fp8(model), file=sys.stderr)


def choose_fastest(
    model: PreTrainedModel, model_args: ModelArguments, args: TrainingArguments, further: Iterable[str] = ()
) -> None:
    """Let a GPU compute with the fastest that nobody chose otherwise, and say so."""
    named = getattr(args, "chosen", frozenset()) | implementations(model_args).keys() | set(further)
    if said := take_fastest(model, args, named):
        print(said, file=sys.stderr)


def not_whole(source: str) -> ValueError:
    return ValueError(
        f"{source} is an adapter, and training starts from a whole model: give the merged one ({source}/merged, "
        "if --lora_merge wrote it), or the adapter's base with --lora_parts for a new adapter."
    )


def right_config(source: str, model_args: ModelArguments, args: TrainingArguments) -> dict[str, PreTrainedConfig]:
    """For `from_pretrained`: the config, where that in `source` has ids that the model has no row for, and says which,
    or where its router is to be another.

    Raises ValueError where the generation config in a folder does not load, or the router is not to be had.
    """
    check_generation_config(Path(source))
    where = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    config, left_out = mended_config(source, **where)
    if left_out:
        print(left_out, file=sys.stderr)
    if model_args.router_type is not None or model_args.router_args is not None:
        config = with_router(config or auto_config(source, **where), source, model_args)
    return {} if config is None else {"config": config}


def with_router(config: PreTrainedConfig, source: str, model_args: ModelArguments) -> PreTrainedConfig:
    """The config with the router that the arguments name. Raises ValueError where it is not to be had."""
    if not isinstance(config, HfMoeRouterCode):
        raise ValueError(
            f"router_type and router_args are for models of hf_moe, and {source} is a {config.model_type}: make it "
            "one with hf-moe import or hf-moe upcycle."
        )
    wanted = model_args.router_type or config.router_type
    if wanted not in ROUTERS:
        raise ValueError(
            f"router_type is {wanted!r}; it can be {', '.join(ROUTERS)}, or one of yours: name its file (--plugin)."
        )
    given = model_args.router_args
    if given is not None:
        config.router_args = json.loads(given) if isinstance(given, str) else dict(given)
    elif wanted != config.router_type:
        config.router_args = {}
    config.router_type = wanted
    built(config.validate, f"router_type {wanted}")
    return config


def say_new_positions(model: PreTrainedModel, args: TrainingArguments) -> None:
    """One line where rows may be longer than what the model has seen, which lengthens its context, or is a mistake."""
    length = getattr(args, "max_length", None)
    seen = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if length and seen and length > seen:
        print(
            f"max_length is {length}, beyond the model's max_position_embeddings, {seen}: positions from there on are "
            "new to it.",
            file=sys.stderr,
        )


def implementations(model_args: ModelArguments) -> dict[str, str]:
    """Of attention and experts, where the arguments name them."""
    names = ("attn_implementation", "experts_implementation")
    return {name: getattr(model_args, name) for name in names if getattr(model_args, name) is not None}


def expert_parallel(size: int) -> dict[str, DistributedConfig]:
    """What makes Transformers split the experts of each layer over `size` processes, and shard the rest over all.

    Raises ValueError where the processes cannot be divided so.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if size < 1 or processes % size:
        raise ValueError(
            f"expert_parallel_size is {size}, which does not divide the {processes} processes of this run: start with "
            "--accelerate expert_parallel on as many GPUs, or a multiple."
        )
    if size > 1 and not CLIPS_EXPERT_PARALLEL:
        raise ValueError(
            f"expert_parallel_size is {size}, which needs Transformers 5.23: before, the norm that gradients are "
            "clipped by leaves some of them out. Upgrade, or shard with --accelerate fsdp2."
        )
    if size == 1:
        return {}
    return {"distributed_config": DistributedConfig(fsdp_size=processes, ep_size=size, ep_implementation="hf_moe")}


def choose_trained(model: PreTrainedModel, group: str, args: TrainingArguments, says: bool = True) -> None:
    """Freeze what `group` leaves out, and say what trains, unless something else is still to choose."""
    chosen = train_group(model, group)
    if says:
        print(chosen, file=sys.stderr)
    if "router" not in GROUPS[group]:
        keep_selection_bias(args)


def keep_selection_bias(args: TrainingArguments) -> None:
    """Where the router is frozen, so is its selection bias, which is as much of its choice as its weights.

    Only a speed among the arguments moves it, not the one of the configuration.
    """
    if args.router_bias_update_speed is None:
        args.router_bias_update_speed = 0.0
