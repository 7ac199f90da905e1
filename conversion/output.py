"""Writing a converted model: weights, config, remote code and the files that go along, in one atomic step."""

import hashlib
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save

from ..chat import write_plain_templates
from ..generation_settings import FILE as GENERATION_CONFIG
from ..generation_settings import write_mended
from ..hub import inherited, write_model_card
from ..model.configuration_hf_moe import HfMoeConfig
from ..model.configuration_hf_moe_graft import HfMoeGraftConfig
from ..model.modeling_hf_moe_graft import HfMoeGraftForCausalLM
from ..reading import positions
from ..sizes.counts import OURS, graft_params, sizes
from ..staging import check_destination, resumable
from ..version import __version__
from .files.hashing import BUFFER, Hashing, fingerprint
from .files.source import Source
from .files.tokenizer import keep_class, load_tokenizer
from .files.writer import Output, Shard, check_space, plan_shards, write_shards
from .options import ConversionOptions
from .verify import WINDOW, check_memory, memory_needed, token_ids, unusable, verify

# A source, and the text that it is compared on (None: the usual one).
Domain = tuple[Source, str | Path | None]


def convert(
    source: Source,
    model: HfMoeConfig,
    outputs: list[Output],
    dst: str | Path,
    options: ConversionOptions,
    *,
    provenance: dict[str, Any],
    exported: PreTrainedConfig | None = None,
    memory: int = 0,
    domains: Sequence[Domain] = (),
    measure: Callable[[Path], dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Write the model that `model` and `outputs` describe to `dst`, and report on it.

    provenance: what is done, with which arguments; it is completed with where the source came from, and stands in the
    model card and in an hf_moe model's config. exported: the config of another family, in whose names `outputs` are.
    memory: bytes that are needed before any is written. domains: sources that the model is compared with besides.
    measure: what else is found out of the folder with the model when it is compared; it joins provenance and report.
    """
    config = exported or model
    dst = check_destination(Path(dst), options.resume)
    check = options.verify
    if check and source.incomparable and not options.dry_run:
        raise ValueError(f"{source.incomparable}; pass verify=False (--no-verify).")
    shards = plan_shards(outputs, options.max_shard_size)
    models = [(source.config, source.checkpoint.entries), (config, {output.name: output for output in outputs})]
    to_verify = memory_needed(models) if check and not source.incomparable else None
    report = described(source, model, dst, shards) | {"dry_run": options.dry_run}
    if options.dry_run:
        here = anonymous_memory()
        report["peak_memory_bytes"] = here + max(memory, BUFFER + max(output.held for output in outputs))
        report["verify_memory_bytes"] = None if to_verify is None else here + to_verify
        return report
    if check:
        check_memory(to_verify)
        # Not after hours of writing.
        positions(source.config.get_text_config(), WINDOW)
        for sibling, text in domains:
            token_ids(sibling.checkpoint.folder, text, model.vocab_size)
    check_space(dst, report["disk_bytes"])
    tokenizer = load_tokenizer(source.checkpoint.folder)
    plan = plan_of(source, config, shards, provenance, options.max_shard_size)
    provenance |= {"source": source.name, "model_type": source.model_type, "revision": source.revision}
    with resumable(dst, plan, options.resume) as (folder, journal):
        # What goes along comes first: of it something may fail, and not after an hour of writing weights.
        write_carried(source, folder, model.vocab_size)
        config.dtype = source.config.dtype or source.checkpoint.dtype
        write_config(config, folder, provenance)
        if tokenizer is not None:
            keep_class(tokenizer, folder)
        provenance |= write_weights(source, folder, shards, journal, dst.name if options.progress else None)
        write_config(config, folder, provenance)
        journal.complete = True
        if check:
            provenance |= compared(source, folder, domains)
            report |= provenance["check"] | {name: provenance[name] for name in ("domains",) if name in provenance}
            if measure is not None:
                found = measure(folder)
                provenance |= found
                report |= found
            write_config(config, folder, provenance)
        write_model_card(folder, name=dst.name, provenance=provenance)
    return report


def described(source: Source, model: HfMoeConfig, dst: Path, shards: list[Shard]) -> dict[str, Any]:
    """What a report says before anything is written."""
    return {
        "output": str(dst),
        "source": source.name,
        "model_type": source.model_type,
        **costs(model),
        "dtype": str(source.checkpoint.dtype).removeprefix("torch."),
        "disk_bytes": sum(shard.nbytes for shard in shards),
        "shards": len(shards),
        "carried_files": [str(path) for path in source.carried_files()],
        "ignored_config_keys": source.ignored_config_keys,
    }


def write_carried(source: Source, folder: Path, vocab_size: int) -> None:
    """The files that go along, tokenizer and templates among them; a generation config's ids are mended, and said."""
    for path in source.carried_files():
        (folder / path).parent.mkdir(exist_ok=True)
        if path.name != GENERATION_CONFIG:
            shutil.copyfile(source.checkpoint.folder / path, folder / path)
        elif left_out := write_mended(source.checkpoint.folder / path, folder / path, vocab_size):
            print(left_out, file=sys.stderr)
    write_plain_templates(folder)


def write_weights(source: Source, folder: Path, shards: list[Shard], journal, title: str | None) -> dict[str, Any]:
    """Write the shards, with a bar if it has a title; returns what of the source they were made from."""
    total = sum(shard.nbytes for shard in shards)
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=title, disable=title is None)

    def advance(count: int) -> None:
        bar.update(count)
        source.checkpoint.release()

    with Hashing(source.checkpoint) as hashing, bar:
        write_shards(folder, shards, advance, journal)
        made = {"sha256": hashing.digests(), "hf_moe_version": __version__}
    return made | inherited(source.checkpoint.folder)


def compared(source: Source, folder: Path, domains: Sequence[Domain]) -> dict[str, Any]:
    """The comparison with the source, and of a merge the one with each source on its own text."""
    trusted = {"trust_remote_code": bool(source.code)}
    check = verify(source.checkpoint.folder, folder, **trusted)
    found: dict[str, Any] = {"check": check | {"warning": unusable(check)}}
    if domains:
        found["domains"] = [
            {"source": sibling.name} | verify(sibling.checkpoint.folder, folder, data=text, **trusted)
            for sibling, text in domains
        ]
    return found


def write_config(config: PreTrainedConfig, folder: Path, provenance: dict[str, Any]) -> None:
    """Write config.json; an hf_moe model's says where it comes from, and the model's code lies beside it."""
    ours = OURS.get(type(config))
    if ours is not None:
        config.provenance = provenance
        kind = ours.of(config) if type(config) is HfMoeGraftConfig else ours  # with pictures, or text alone
        config.architectures = [kind.__name__]
    if ours is not None:
        custom_object_save(ours, folder)  # its module and what that imports
    config.save_pretrained(folder)


def plan_of(
    source: Source,
    config: PreTrainedConfig,
    shards: list[Shard],
    provenance: dict[str, Any],
    max_shard_size: int | str,
) -> dict[str, Any]:
    """All that decides which bytes a conversion writes.

    Scores are not: they decide what is kept, and have other last digits where more threads add them up.
    """
    arguments = provenance.get("arguments", {})
    layout = b"".join(shard.header for shard in shards)
    return {
        **{name: value for name, value in provenance.items() if name not in ("arguments", "scores")},
        **arguments,
        "max_shard_size": max_shard_size,
        "source": source.name,
        "revision": source.revision,
        "source_contents": fingerprint(source.checkpoint),
        "model_type": config.model_type,
        "config": hashlib.sha256(config.to_json_string(use_diff=False).encode()).hexdigest(),
        "tensors": hashlib.sha256(layout).hexdigest(),
        "hf_moe_version": __version__,
    }


def costs(config: HfMoeConfig | HfMoeGraftConfig) -> dict[str, int]:
    """What the model is and what a token costs, as `hf-moe inspect` counts it; of a graft, parameters alone."""
    if isinstance(config, HfMoeGraftConfig):
        with torch.device("meta"):
            return graft_params(HfMoeGraftForCausalLM(config))
    said = sizes(config)
    return {name: said[name] for name in ("total_params", "active_params", "flops_per_token", "context")}


def anonymous_memory() -> int:
    """Bytes of memory that this process has and that no file backs."""
    used = psutil.Process().memory_info()
    return used.rss - getattr(used, "shared", 0)
