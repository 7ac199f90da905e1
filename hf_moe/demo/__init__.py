"""What `hf-moe demo` works on: a tiny trained dense model and a grammar that writes its text."""

from pathlib import Path

# A Llama of under half a million parameters with its tokenizer; `make_model.py` makes it.
DEMO_MODEL = Path(__file__).parent / "storyteller"

__all__ = ["DEMO_MODEL"]
