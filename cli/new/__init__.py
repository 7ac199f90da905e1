"""`hf-moe new`: files to begin with."""

import keyword
from pathlib import Path
from typing import Annotated

import typer

new = typer.Typer(help="Write a file to begin with: a router of your own.", invoke_without_command=True)
TEMPLATES = Path(__file__).parent
NAME = "my_router"  # in the template


@new.callback()
def group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


@new.command()
def router(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What router_type will call it.")],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Where to; unless given NAME.py.")] = None,
) -> None:
    """Write a router with its test against a slow computation: works as it is, to be changed."""
    from hf_moe.model.routing import ROUTERS
    from hf_moe.staging import written_aside

    file = out or Path(f"{name}.py")
    if not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"The name {name!r} is none that a Python function can have: take letters, digits and _.")
    if name in ROUTERS:
        raise ValueError(f"There is a router {name!r} already; the routers are {', '.join(ROUTERS)}.")
    if file.exists():
        raise FileExistsError(f"{file} exists: give another --out, or move it away.")
    text = (TEMPLATES / "router.py").read_text(encoding="utf-8").replace(NAME, name)
    with written_aside(file) as aside:
        aside.write_text(text, encoding="utf-8")
    print(f"{file}: change `{name}` and its test, and then")
    print(f"    pytest {file}")
    print("    hf-moe train tiny/pretrain --model_name_or_path MODEL --train_data TEXT --output_dir OUT \\")
    print(f"        --from_scratch true --router_type {name} --plugin {file}")
