"""The `hf-moe` command. Only typer is imported before a command runs, so that `--help` answers at once."""

import sys
from typing import Annotated

import typer

from .card import card
from .check import check
from .compare import compare
from .convert import export, import_, upcycle, verify
from .demo import demo
from .errors import one_line
from .generate import generate
from .inspect import inspect, presets
from .lab import lab
from .new import new
from .plan import plan
from .push import push
from .renew import renew
from .reshape import experts, grow, prune
from .trace import trace
from .train import train

app = typer.Typer(
    name="hf-moe",
    help="Mixture-of-experts models as one Transformers family.",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def before(
    plugin: Annotated[
        list[str],
        typer.Option(
            metavar="FILE",
            default_factory=list,
            show_default=False,
            help="Run this Python file first: it registers routers and the like of your own. Goes behind the command, "
            "too; may be repeated. In recipes it is `plugins`.",
        ),
    ],
) -> None:
    if plugin:
        from hf_moe.plugins import load_plugin

        for file in plugin:
            load_plugin(file)


app.command()(demo)
app.command()(upcycle)
app.command("import")(import_)
app.command()(export)
app.command()(verify)
app.command()(prune)
app.command()(grow)
app.command()(experts)
# A recipe's keys are its own business, so train takes any option and passes it on; its --help tells of them, too.
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)(train)
app.command()(compare)
app.command()(generate)
app.command()(trace)
app.command()(check)
app.command()(card)
app.command()(push)
app.command()(renew)
app.command()(inspect)
app.command()(presets)
app.command()(plan)
app.add_typer(new, name="new")
app.command()(lab)


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0 done, 1 a check failed, 2 the user's mistake, 130 interrupted."""
    arguments = plugins_first(sys.argv[1:] if argv is None else argv)
    try:
        # Outside standalone mode typer returns the code of typer.Exit, and raises what it would have printed.
        return (
            typer.main.get_command(app).main(arguments or ["--help"], prog_name="hf-moe", standalone_mode=False) or 0
        )
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        # The reader has gone (`hf-moe ... | head`); without this Python would complain again at exit.
        sys.stdout = None
        return 0
    except Exception as error:
        message = one_line(error)
        if message is None:
            raise
        print(f"hf-moe: {message}", file=sys.stderr)
        return 2


def plugins_first(words: list[str]) -> list[str]:
    """`--plugin FILE` before the command, where it is read, wherever it was; of `train`, which may start further
    processes that need it, as `plugins` of the recipe."""
    plugins, rest = [], []
    left = iter(words)
    for word in left:
        if word == "--plugin":
            plugins.append(next(left, ""))
        elif word.startswith("--plugin="):
            plugins.append(word.partition("=")[2])
        else:
            rest.append(word)
    if plugins and rest[:1] == ["train"]:
        return [*rest, "--plugins", *plugins]
    return [option for plugin in plugins for option in ("--plugin", plugin)] + rest
