"""`hf-moe demo`."""


def demo() -> None:
    """x"""
