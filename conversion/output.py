"""Writing a converted model: weights, config, remote code and the files that go along, in one atomic step."""

import hashlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm
from transformers import PreTrainedConfig
from transformers.dynamic_module_utils import custom_object_save

from ..chat import write_plain_templates
from ..generation_settings import FILE as GENERATION_CONFIG
from ..generation_settings import write_mended
from ..hub import inherited, write_model_card
from ..model.configuration_hf_moe import HfMoeConfig
from ..model.modeling_hf_moe import HfMoeForCausalLM
from ..sizes.counts import sizes
from ..staging import check_destination, resumable
from ..version import __version__
from .files.hashing import BUFFER, Hashing, fingerprint
from .files.source import Source
from .files.tokenizer import keep_class, load_tokenizer
from .files.writer import Output, Shard, check_space, plan_shards, write_shards
from .verify import MAX_TOKENS, check_memory, memory_needed, token_ids, unusable, verify


def convert(
    source: Source,
    model: HfMoeConfig,
    outputs: list[Output],
    dst: str | Path,
    *,
    provenance: dict[str, Any],
    exported: PreTrainedConfig | None = None,
    max_shard_size: int | str,
    dry_run: bool,
    check: bool,
    progress: bool,
    resume: bool = False,
    memory: int = 0,
    domains: Sequence[tuple[Source, str | Path | None]] = (),
) -> dict[str, Any]:
    """Write the model that `model` and `outputs` describe to `dst`, and report on it.

    provenance: what is done, with which arguments; it is completed with where the source came from, and stands in the
    model card and in an hf_moe model's config. exported: the config of another family, in whose names `outputs` are.
    resume: go on with what an interrupted call has written. memory: bytes that are needed before any is written.
    domains: sources that the model is compared with besides, each on a text of its own (None: the usual one).
    """
    config = exported or model
    dst = check_destination(Path(dst), resume)
    if check and source.incomparable and not dry_run:
        raise ValueError(f"{source.incomparable}; pass verify=False (--no-verify).")
    shards = plan_shards(outputs, max_shard_size)
    nbytes = sum(shard.nbytes for shard in shards)
    report = {
        "output": str(dst),
        "source": source.name,
        "model_type": source.family.model_type,
        **costs(model),
        "dtype": str(source.checkpoint.dtype).removeprefix("torch."),
        "disk_bytes": nbytes,
        "shards": len(shards),
        "carried_files": [str(path) for path in source.carried_files()],
        "ignored_config_keys": source.ignored_config_keys,
        "dry_run": dry_run,
    }
    models = [(source.config, source.checkpoint.entries), (config, {output.name: output for output in outputs})]
    verify_memory = memory_needed(models) if check and not source.incomparable else None
    if dry_run:
        here = anonymous_memory()
        report["peak_memory_bytes"] = here + max(memory, BUFFER + max(output.held for output in outputs))
        report["verify_memory_bytes"] = None if verify_memory is None else here + verify_memory
        return report
    if check:
        check_memory(verify_memory)
        for sibling, text in domains:  # not after hours of writing
            token_ids(sibling.checkpoint.folder, text, model.vocab_size, MAX_TOKENS, seed=0)
    check_space(dst, nbytes)
    tokenizer = load_tokenizer(source.checkpoint.folder)
    plan = plan_of(source, config, shards, provenance, max_shard_size)
    with resumable(dst, plan, resume) as (folder, journal):
        # What goes along comes first: of it something may fail, and not after an hour of writing weights.
        for path in source.carried_files():
            (folder / path).parent.mkdir(exist_ok=True)
            if path.name != GENERATION_CONFIG:
                shutil.copyfile(source.checkpoint.folder / path, folder / path)
            elif left_out := write_mended(source.checkpoint.folder / path, folder / path, model.vocab_size):
                print(left_out, file=sys.stderr)
        write_plain_templates(folder)
        config.dtype = source.config.dtype or source.checkpoint.dtype
        provenance |= {"source": source.name, "model_type": source.family.model_type, "revision": source.revision}
        write_config(config, folder, provenance)
        if tokenizer is not None:
            keep_class(tokenizer, folder)
        bar = tqdm(total=nbytes, unit="B", unit_scale=True, desc=dst.name, disable=not progress)

        def advance(count: int) -> None:
            bar.update(count)
            source.checkpoint.release()

        with Hashing(source.checkpoint) as hashing, bar:
            write_shards(folder, shards, advance, journal)
            provenance |= {"sha256": hashing.digests(), "hf_moe_version": __version__}
            provenance |= inherited(source.checkpoint.folder)
        write_config(config, folder, provenance)
        journal.complete = True
        if check:
            provenance["check"] = verify(source.checkpoint.folder, folder)
            provenance["check"]["warning"] = unusable(provenance["check"])
            report |= provenance["check"]
            if domains:
                provenance["domains"] = report["domains"] = [
                    {"source": sibling.name} | verify(sibling.checkpoint.folder, folder, data=text)
                    for sibling, text in domains
                ]
            write_config(config, folder, provenance)
        write_model_card(folder, name=dst.name, provenance=provenance)
    return report


def write_config(config: PreTrainedConfig, folder: Path, provenance: dict[str, Any]) -> None:
    """Write config.json; an hf_moe model's says where it comes from, and the model's code lies beside it."""
    if isinstance(config, HfMoeConfig):
        config.provenance = provenance
        config.architectures = [HfMoeForCausalLM.__name__]
    config.save_pretrained(folder)
    if isinstance(config, HfMoeConfig):
        custom_object_save(HfMoeForCausalLM, folder)  # its module and what that imports


def plan_of(
    source: Source,
    config: PreTrainedConfig,
    shards: list[Shard],
    provenance: dict[str, Any],
    max_shard_size: int | str,
) -> dict[str, Any]:
    """All that decides which bytes a conversion writes."""
    arguments = provenance.get("arguments", {})
    layout = b"".join(shard.header for shard in shards)
    return {
        **{name: value for name, value in provenance.items() if name != "arguments"},
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


def costs(config: HfMoeConfig) -> dict[str, int]:
    """What the model is and what a token costs, as `hf-moe inspect` counts it."""
    said = sizes(config)
    return {name: said[name] for name in ("total_params", "active_params", "flops_per_token", "context")}


def anonymous_memory() -> int:
    """Bytes of memory that this process has and that no file backs."""
    used = psutil.Process().memory_info()
    return used.rss - getattr(used, "shared", 0)
