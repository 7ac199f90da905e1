"""Conversion of checkpoints: dense to mixture of experts, families to hf_moe and back, logits side by side."""

from .export_checkpoint import export_checkpoint, nearest_families
from .import_checkpoint import import_checkpoint
from .upcycle import upcycle
from .verify import verify

__all__ = ["export_checkpoint", "import_checkpoint", "nearest_families", "upcycle", "verify"]
