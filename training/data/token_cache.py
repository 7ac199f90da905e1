"""Conversations tokenised once: an Arrow file on disk, memory-mapped, under a name made of all that it depends on."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import datasets
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from .chat_templates import training_template
from .long_rows import fit
from .rows import PLAIN
from .sources import digest
from .tokens import Encoder

BATCH = 1000


def can_tokenise(groups: list[Dataset], tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> bool:
    """Whether all rows are plain conversations, and tokenizer and template at hand. Else TRL tokenises."""
    return (
        all(rows.features == {"messages": PLAIN} for rows in groups)
        and tokenizer.is_fast
        and args.eos_token is None
        and args.chat_template_path is None
    )


def tokenised(
    rows: Dataset, name: str, tokenizer: PreTrainedTokenizerBase, args: SFTConfig, packing: bool | None = None
) -> Dataset:
    """Conversations as `input_ids` and `labels`, fitted to `max_length`.

    Raises ValueError as `Encoder`, `training_template` and `fit`.
    """
    template = training_template(tokenizer, args)
    encoder = Encoder(tokenizer, template, args.assistant_only_loss, name=name)
    with args.main_process_first(desc=f"tokenising {name}"):
        if not encoder.agrees_with_transformers(rows):
            print(f"{name}: tokie does not read this tokenizer; Transformers tokenises, more slowly", file=sys.stderr)
            encoder.fast = False
        tokens = cached(rows, encoder, name, processes(rows, args))
    return fit(tokens, name, args, args.packing if packing is None else packing)


def processes(rows: Dataset, args: SFTConfig) -> int | None:
    """How many are worth their start."""
    return args.dataset_num_proc if len(rows) > 10 * BATCH else None


def cached(rows: Dataset, encoder: Encoder, name: str, num_proc: int | None = None) -> Dataset:
    """`encoder` of all `rows`, from the cache if they have been there.

    `datasets` writes each process's part aside and renames it when it is whole: after a kill, whole parts are used
    and the others are made again.
    """
    key = cache_key(rows, encoder)
    path = Path(datasets.config.HF_DATASETS_CACHE) / "hf_moe" / f"{key}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    return (
        rows.with_format("arrow")
        .map(
            encoder,
            batched=True,
            with_indices=True,
            batch_size=BATCH,
            remove_columns=rows.column_names,
            num_proc=num_proc,
            cache_file_name=str(path),
            load_from_cache_file=True,
            new_fingerprint=key,
            desc=f"Tokenising {name}",
        )
        .with_format(None)
    )


def cache_key(rows: Dataset, encoder: Encoder) -> str:
    """Hash of what the tokens depend on: the rows' contents, the tokenizer, the template, what counts, tokie."""
    how = [
        encoder.description,
        encoder.template,
        encoder.given,
        encoder.assistant_only,
        encoder.fast,
        version("tokie"),
    ]
    return digest(rows, json.dumps(how, default=str).encode())
