"""The only exception that this package raises on purpose."""


class CheckpointError(ValueError):
    """A checkpoint is wrong or ambiguous. The message names the file, what was expected and what was found."""
