"""What goes to the Hub: model cards and uploads."""

from .card import write_model_card
from .checks import check_base
from .folder import MARKER, RECORD, inherited, stages_of
from .renew import renew
from .upload import plain_errors, push, push_folder

__all__ = [
    "MARKER",
    "RECORD",
    "check_base",
    "inherited",
    "plain_errors",
    "push",
    "push_folder",
    "renew",
    "stages_of",
    "write_model_card",
]
