"""Entry point of the vLLM plugin."""


def register() -> None:
    """Called by vLLM in every process."""
