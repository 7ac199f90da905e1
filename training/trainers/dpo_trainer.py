"""TRL's direct preference optimisation for mixture-of-experts models."""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from hf_moe.conversion.files.tokenizer import load_tokenizer
from trl import DPOConfig, DPOTrainer

from hf_moe.same_tokens import check_same_tokens

from ..host import loaded_from
from .policy import MoePolicyMixin, PolicyArguments
from .sft_trainer import NAMES

MODEL_INPUTS = ("input_ids", "attention_mask")


@dataclass
class MoeDPOConfig(PolicyArguments, DPOConfig):
    """DPOConfig with what MoeDPOTrainer adds."""

    def __post_init__(self):
        super().__post_init__()
        if "exo_pair" in self.loss_type and not self.label_smoothing:
            raise ValueError("loss_type is exo_pair, which needs a label_smoothing above 0: EXO's paper has 1e-3.")


class MoeDPOTrainer(MoePolicyMixin, DPOTrainer):
    """TRL's DPOTrainer (https://arxiv.org/abs/2305.18290) with routing that is right; see MoeTrainerMixin.

    Balance losses, where a recipe asks for them, count the tokens of the chosen and the rejected texts alike, for both
    pass through the policy; never those of the reference.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_reference(self)

    def model_inputs(self, inputs: dict) -> dict:
        return {name: inputs[name] for name in MODEL_INPUTS}

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        """TRL's own, which cuts and leaves out rows by `max_length` without a word; here they are counted."""
        prepare = super()._prepare_dataset
        if not isinstance(dataset, Dataset) or args.max_length is None:
            return prepare(dataset, processing_class, args, dataset_name)
        uncut = copy.copy(args)
        uncut.max_length = None
        rows = prepare(dataset, processing_class, uncut, dataset_name)
        return fit(rows, NAMES.get(dataset_name, f"eval_data {dataset_name}"), args)


def check_reference(trainer: DPOTrainer) -> None:
    """Raises ValueError where a reference of the caller's own has other rows, or came with another tokenizer."""
    if trainer.ref_model is None:
        return
    reference = trainer.accelerator.unwrap_model(trainer.ref_model)
    sizes = [x.config.get_text_config().vocab_size for x in (reference, trainer.moe)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"The reference has {sizes[0]} logits, the model {sizes[1]}: they cannot be compared.")
    source, _ = loaded_from(reference.config)
    if source and Path(source).is_dir() and (theirs := load_tokenizer(Path(source))) is not None:
        why = "a reference reads the model's ids; give one with its tokenizer."
        names = (f"reference {source}", "the model")
        check_same_tokens(theirs, trainer.processing_class, names, sizes[0], why, roles=False)


def fit(rows: Dataset, name: str, args: DPOConfig) -> Dataset:
    """The pairs of which `max_length` leaves some answer; says how many it cuts. Raises ValueError if none is left.

    The collator does the cutting.
    """
    parts = [lengths(table) for table in rows.with_format("arrow").iter(batch_size=10_000)]
    prompts, answers = (np.concatenate(part) for part in zip(*parts, strict=True))
    keep = np.ones(len(rows), dtype=bool) if args.truncation_mode == "keep_end" else prompts < args.max_length
    cut = int((keep & (prompts + answers > args.max_length)).sum())
    if cut:
        print(
            f"{name}: {cut} of {len(rows)} pairs are longer than max_length {args.max_length}: cut to it",
            file=sys.stderr,
        )
    if not keep.any():
        raise ValueError(f"{name} has no pair whose prompt is shorter than max_length {args.max_length}: raise that.")
    if not keep.all():
        lost = f"{len(rows) - int(keep.sum())} of {len(rows)} pairs"
        print(f"{name}: the prompts of {lost} fill max_length {args.max_length}: left out", file=sys.stderr)
    return rows if keep.all() else rows.select(np.flatnonzero(keep))


def lengths(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Of each pair the tokens of its prompt, and of its longer answer."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    prompt, chosen, rejected = (
        table[x].combine_chunks().value_lengths().to_numpy(zero_copy_only=False) for x in names
    )
    return prompt, np.maximum(chosen, rejected)
