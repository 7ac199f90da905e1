"""Looking inside a mixture of experts: what its routers do with a text."""

from .tracing import trace

__all__ = ["trace"]
