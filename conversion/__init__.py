"""Conversion of checkpoints: dense to mixture of experts, released families to hf_moe, logits side by side."""

from .import_checkpoint import import_checkpoint
from .upcycle import upcycle
from .verify import verify

__all__ = ["import_checkpoint", "upcycle", "verify"]
