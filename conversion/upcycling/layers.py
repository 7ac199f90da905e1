"""Which layers become sparse, and by which strategy each."""

import re
from collections.abc import Sequence


def parse_layers(spec: str, layers: Sequence[int], default: str) -> dict[int, str]:
    """Those of the `layers`, which have dense networks, that `spec` names, counted from 0, with their strategies.

    A comma-separated list of "all", one layer ("8") or a range with both ends ("2-5"), each with every n-th of them
    ("all/2", "1-9/2": the first, then every second) and a strategy of its own ("2-5=drop") instead of the `default`.
    Raises a ValueError of one line.
    """
    chosen: dict[int, str] = {}
    for part in spec.split(","):
        read = re.fullmatch(r"\s*(?:(all)|(\d+)\s*(?:-\s*(\d+))?)\s*(?:/\s*([1-9]\d*))?\s*(?:=\s*(\w+))?\s*", part)
        if read is None:
            raise ValueError(
                f"layers {spec!r} is not understood; write 'all', 'all/2' for every second, or a list such as "
                "'2-5,8' or '0-3=copy,4-7=drop'."
            )
        everything, first, last, step, strategy = read.groups()
        first, last = (0, layers[-1]) if everything else (int(first), int(last or first))
        if not first <= last <= layers[-1]:
            raise ValueError(f"layers {spec!r}: {part.strip()} is not within 0-{layers[-1]}.")
        within = [layer for layer in layers if first <= layer <= last]
        if not within:
            raise ValueError(
                f"layers {spec!r}: {part.strip()} has no dense feed-forward network; these layers have one: "
                f"{', '.join(map(str, layers))}."
            )
        named = dict.fromkeys(within[:: int(step or 1)], strategy or default)
        twice = sorted(named.keys() & chosen.keys())
        if twice:
            raise ValueError(f"layers {spec!r} names layer {twice[0]} twice.")
        chosen |= named
    return chosen
