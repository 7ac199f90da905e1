"""Upcycling: strategies that make a layer's experts out of its dense feed-forward network, one a file.

A new one is a subclass of `Strategy` and an entry here.
"""

from .carve import Carve
from .copy import Copy
from .drop import Drop
from .granular import Granular
from .merge import Merge
from .noise import Noise
from .shared import Shared
from .split import Split
from .strategy import Strategy

UPCYCLERS: dict[str, type[Strategy]] = {
    "copy": Copy,
    "noise": Noise,
    "drop": Drop,
    "granular": Granular,
    "split": Split,
    "carve": Carve,
    "shared": Shared,
    "merge": Merge,
}
