"""What goes to the Hub: model cards and uploads."""

from .card import CURVES, write_model_card
from .checks import check_base
from .curves import draw_curves
from .folder import MARKER, METRICS, RECORD, RUN_FILE, inherited, stages_of
from .renew import renew
from .upload import plain_errors, push, push_folder

__all__ = [
    "CURVES",
    "MARKER",
    "METRICS",
    "RECORD",
    "RUN_FILE",
    "check_base",
    "draw_curves",
    "inherited",
    "plain_errors",
    "push",
    "push_folder",
    "renew",
    "stages_of",
    "write_model_card",
]
