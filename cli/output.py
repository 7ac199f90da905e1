"""What a command prints: text for people, or one JSON object on standard output and nothing else."""

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping


@contextlib.contextmanager
def messages_on_stderr() -> Iterator[None]:
    """Send what libraries print to standard error, so that standard output holds the result alone.

    So does what an interrupt says: typer keeps its exit code only.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except KeyboardInterrupt as interrupt:
        if str(interrupt):
            print(f"hf-moe: {interrupt}", file=sys.stderr)
        raise


def hide_loading_bars() -> None:
    """Leave out the bar that Transformers draws at each load of a model."""
    import transformers

    transformers.utils.logging.disable_progress_bar()


def print_report(report: dict, as_json: bool, titles: Mapping[str, str] = {}) -> None:
    """Print `report` as one JSON object, or a line per fact that there is, called by its title or else its name."""
    if as_json:
        print(json.dumps(report, default=str))
        return
    known = {
        titles.get(name, name.replace("_", " ")): value
        for name, value in report.items()
        if value is not None and value is not False and value not in ([], {})
    }
    width = max((len(name) for name in known), default=0)
    for name, value in known.items():
        print(f"{name:<{width}}  {_readable(value)}")


def _readable(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):
        return ("; " if isinstance(value[0], dict) else ", ").join(map(_readable, value))
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_readable(each)}" for name, each in value.items())
    return str(value)
