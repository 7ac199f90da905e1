"""Where model cards of hf_moe 0.2 and before import `load_rows` from."""

from .weights.esft import load_rows

__all__ = ["load_rows"]
