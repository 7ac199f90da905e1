"""Mistral: arXiv 2310.06825. The sliding window, if there is one, holds in every layer."""

from .family import DECODER_FIELDS, Family, same

MISTRAL = Family(
    model_type="mistral",
    fields={**DECODER_FIELDS, **same("head_dim", "sliding_window")},
)
