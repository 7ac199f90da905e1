"""What goes to the Hub: model cards and uploads."""

from .card import write_model_card
from .folder import MARKER, inherited
from .upload import push

__all__ = ["MARKER", "inherited", "push", "write_model_card"]
