"""granular: the dense network E times, each cut into G fine-grained experts (https://arxiv.org/abs/2410.07524, 4.2).

A token meets whole networks at first, so the model starts where the dense one stands; training unties the pieces.
"""

from .copy import Copy
from .strategy import REQUIRED


class Granular(Copy):
    options = {"granularity": REQUIRED}
