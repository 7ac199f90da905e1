"""Conversion of checkpoints: dense to mixture of experts, families to hf_moe and back, other experts, logits."""

from .export_checkpoint import export_checkpoint, nearest_families
from .import_checkpoint import import_checkpoint
from .reshape import exchange_experts, grow, prune
from .upcycle import upcycle
from .verify import verify

__all__ = [
    "exchange_experts",
    "export_checkpoint",
    "grow",
    "import_checkpoint",
    "nearest_families",
    "prune",
    "upcycle",
    "verify",
]
