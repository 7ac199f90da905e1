"""How large a model is and what it costs: counts, published models, plans of runs, scaling laws."""

from .counts import sizes

__all__ = ["sizes"]
