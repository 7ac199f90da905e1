"""Options that some strategies and router starts read and others do not: nothing that is given goes unread."""

from collections.abc import Mapping
from typing import Any

from .strategy import REQUIRED


def complete(declared: Mapping[str, Any], given: Mapping[str, Any], reader: str) -> dict[str, Any]:
    """The `declared` options with the values given for them. Raises a ValueError for one that is required."""
    options = {name: given.get(name, default) for name, default in declared.items()}
    for name, value in options.items():
        if value is REQUIRED:
            raise ValueError(f"{reader} needs {name}.")
    return options


def refuse_unread(given: Mapping[str, Any], used: Mapping[str, Mapping], known: Mapping[str, Mapping]) -> None:
    """Raise a ValueError for an option that none of the `used` readers declares; it names those `known` that do."""
    for name, value in given.items():
        if any(name in declared for declared in used.values()):
            continue
        readers = [reader for reader, declared in known.items() if name in declared]
        who = f"it is read by {', '.join(readers)}" if readers else "nothing reads it"
        raise ValueError(f"{name} ({value}) has no effect with {' and '.join(used)}; {who}.")
