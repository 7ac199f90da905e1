"""Keeping secrets out of what is printed and uploaded."""

import contextlib
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator

from huggingface_hub import get_token

# What tokens of the Hub, GitHub, OpenAI, AWS and Slack look like, and private keys.
TOKENS = re.compile(
    r"\b(?:hf_(?:oauth_)?[A-Za-z0-9]{20,}|api_org_[A-Za-z]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{40,}"
    r"|sk-[A-Za-z0-9_-]{32,}|AKIA[0-9A-Z]{16}|xox[abprs]-[A-Za-z0-9-]{20,})\b"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
SHORTEST = 8  # what is shorter is no token, and stands in any text
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACEHUB_API_TOKEN")


def known_tokens(token: str | None = None) -> list[str]:
    """The tokens of this machine's user: `token`, the environment's and the one that `hf auth login` stored."""
    found = {token, get_token(), *(os.environ.get(name) for name in VARIABLES)}
    return sorted((x for x in found if x and len(x) >= SHORTEST), key=len, reverse=True)


def redacted(text: str, token: str | None = None) -> str:
    """`text` with every token that is known, or that looks like one, replaced."""
    for known in known_tokens(token):
        text = text.replace(known, "[token]")
    return TOKENS.sub("[token]", text)


class RedactingFilter(logging.Filter):
    """Redacts a record's message, arguments included."""

    def __init__(self, token: str | None):
        super().__init__()
        self.token = token

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage(), self.token), ()
        return True


@contextlib.contextmanager
def redacted_messages(token: str | None = None) -> Iterator[None]:
    """Redact what libraries log meanwhile, and what they warn about, which is said at the end.

    Python's warnings belong to the process, so those of another thread than the main one are let through.
    """
    handlers = [*logging.getLogger("huggingface_hub").handlers, *logging.getLogger().handlers]
    redacting = RedactingFilter(token)
    for handler in handlers:
        handler.addFilter(redacting)
    main = threading.current_thread() is threading.main_thread()
    caught = []
    try:
        with warnings.catch_warnings(record=True) if main else contextlib.nullcontext([]) as caught:
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(redacting)
        for warning in caught:
            print(f"warning: {redacted(' '.join(str(warning.message).split()), token)}", file=sys.stderr)
