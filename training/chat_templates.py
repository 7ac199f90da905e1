"""The chat template of a run: the one that the recipe names or the tokenizer's, with the assistant's words marked."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, get_training_chat_template

from .host_trl import has_generation_markers

SUFFIXES = (".jinja", ".j2")  # of files; any other path is a tokenizer, whose template TRL takes over


def training_template(tokenizer: PreTrainedTokenizerBase, args: SFTConfig) -> str:
    """The template's text; TRL's marked one for a family that it knows.

    Raises ValueError where the loss is on the assistant's words alone and nothing marks them.
    """
    if args.chat_template_path is not None:
        tokenizer.chat_template = Path(args.chat_template_path).read_text(encoding="utf-8")
    template = tokenizer.get_chat_template()
    if not args.assistant_only_loss or has_generation_markers(template):
        return template
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise ValueError(
            "assistant_only_loss is true, but the chat template marks no word of the assistant: enclose its words in "
            "{% generation %} and {% endgeneration %} and give --chat_template_path FILE.jinja, or say "
            "--assistant_only_loss false."
        ) from error
