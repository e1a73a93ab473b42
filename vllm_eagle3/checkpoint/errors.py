"""The one exception of this room."""


class CheckpointError(ValueError):
    """A checkpoint that is wrong or ambiguous: says in which file, what was expected and what was found."""
