"""Which exceptions are the user's mistake, and the one line each becomes."""

import typer

# typer's error for wrong arguments; it gives its base class no public name.
UsageError = typer.BadParameter.__mro__[1]

# The extra that brings a package.
EXTRAS = {"datasets": "train", "peft": "train", "trl": "train", "llguidance": "guided", "matplotlib": "plots"}


def one_line(error: Exception) -> str | None:
    """The message for the user, or None where the fault is ours and the traceback should be seen."""
    if isinstance(error, UsageError):
        message = error.format_message()
        if error.ctx is not None:
            message = f"{message}{'' if message[-1] in '.?' else '.'} See {error.ctx.command_path} --help."
    elif isinstance(error, (ValueError, OSError)):
        message = str(error)
    elif isinstance(error, MemoryError):
        message = f"{str(error) or 'out of memory'}: give a smaller model or text, or see whether its config is right."
    elif isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        message = (
            f"this command needs {error.name}, which is not installed: pip install 'hf_moe[{EXTRAS[error.name]}]'"
        )
    elif isinstance(error, ImportError) and error.name is None:  # said by a package, not by a failed import
        message = str(error)
    else:
        from huggingface_hub.errors import StrictDataclassError
        from safetensors import SafetensorError

        if isinstance(error, StrictDataclassError):
            message = str(error.__cause__ or error)
        elif isinstance(error, SafetensorError):
            message = str(error)
        else:
            return None
    return " ".join(message.split()) or type(error).__name__
