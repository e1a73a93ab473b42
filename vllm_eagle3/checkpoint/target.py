"""What a draft needs to know about its target, and checks that it was made for this target."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_eagle3.checkpoint.errors import CheckpointError

NESTED_TEXT_MODELS = ("text_config", "llm_config")


@dataclass(frozen=True)
class TargetFacts:
    """Sizes of the target's text model. A size is None if the target's config does not state it."""

    hidden_size: int | None
    vocab_size: int | None
    num_layers: int | None
    max_position_embeddings: int | None
    architectures: tuple[str, ...]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "TargetFacts":
        """Read them from the target's parsed config.json, in which multimodal targets nest the text model."""
        text: Mapping[str, Any] = next(
            (config[key] for key in NESTED_TEXT_MODELS if isinstance(config.get(key), Mapping)), {}
        )

        def fact(key: str) -> Any:
            return text.get(key, config.get(key))

        def size(key: str) -> int | None:
            value = fact(key)
            return value if isinstance(value, int) else None

        return cls(
            hidden_size=size("hidden_size"),
            vocab_size=size("vocab_size"),
            num_layers=size("num_hidden_layers"),
            max_position_embeddings=size("max_position_embeddings"),
            architectures=_names(config.get("architectures")),
        )

    def check(self, *, hidden_size: int, vocab_size: int, source: str) -> None:
        """Raises CheckpointError when the draft was made for a target of other sizes."""
        for what, key, wanted, found in (
            ("hidden size", "target_hidden_size (or hidden_size)", hidden_size, self.hidden_size),
            ("vocabulary", "vocab_size", vocab_size, self.vocab_size),
        ):
            if found is not None and found != wanted:
                raise CheckpointError(
                    f"{source}: made for another target: {key} says the target's {what} is {wanted}, but "
                    f"this target's is {found}"
                )

    def notes(self, draft_max_position: int, verifier: Mapping[str, Any]) -> list[str]:
        """Warnings about a pair of draft and target that looks wrong but may be intended."""
        notes = []
        if self.max_position_embeddings and draft_max_position < self.max_position_embeddings:
            notes.append(
                f"max_position_embeddings: {draft_max_position}, shorter than the target's "
                f"{self.max_position_embeddings}: beyond it the draft extrapolates and acceptance may fall"
            )
        trained_on = _names(verifier.get("architectures"))
        if trained_on and self.architectures and not set(trained_on) & set(self.architectures):
            notes.append(
                f"target: the draft was trained on {verifier.get('name_or_path')} ({', '.join(trained_on)}), "
                f"this target is {', '.join(self.architectures)}: SAME SIZES, ANOTHER ARCHITECTURE"
            )
        return notes


def _names(value: Any) -> tuple[str, ...]:
    return tuple(name for name in value if isinstance(name, str)) if isinstance(value, list) else ()
