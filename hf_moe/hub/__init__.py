"""What goes to the Hub: model cards and uploads."""

from .card import write_model_card
from .folder import MARKER, inherited

__all__ = ["MARKER", "inherited", "write_model_card"]
