"""Reads the head from the target's files for a draft that has its own vocabulary but no head."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from torch import Tensor

from vllm_eagle3.checkpoint.errors import CheckpointError

HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"  # the embedding where the two are tied


def target_head_rows(target: str, ids: Tensor, revision: str | None = None) -> Tensor:
    """Rows `ids` of the head of the target, [len(ids), h], read from its safetensors files.

    Args:
        target: directory, or name of a model that is in the local Hugging Face cache (the engine has loaded it).
        ids: [n] target ids.
        revision: the revision of the model in the cache; None for the one that `main` names.

    Raises:
        CheckpointError: the files are missing, or none of them holds a head.
    """
    folder = Path(target)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(target, revision=revision, local_files_only=True))
        except (LocalEntryNotFoundError, ValueError) as error:
            raise CheckpointError(
                f"{target}: the draft ships no lm_head, so its rows are read from the target's files, which are not "
                "in the local cache"
            ) from error
    found: dict[str, tuple[Path, str]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                for kind in (HEAD, EMBEDDING):
                    if name == kind or name.endswith(f".{kind}"):
                        found.setdefault(kind, (file, name))
    if not found:
        raise CheckpointError(
            f"{folder}: the draft ships no lm_head; expected {HEAD} or {EMBEDDING} in the target's safetensors files, "
            "found neither"
        )
    file, name = found.get(HEAD) or found[EMBEDDING]
    with safe_open(file, framework="pt") as handle:
        return handle.get_tensor(name)[ids]
