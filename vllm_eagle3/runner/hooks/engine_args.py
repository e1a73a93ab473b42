"""Checks the draft before anything is built, and adds missing keys to the speculative config.

`num_speculative_tokens` becomes the size of the draft tree, and `draft_sample_method` follows the option
`draft_sampling`. This runs in the process that the user started.
"""

import difflib
import logging
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from vllm.engine.arg_utils import EngineArgs
from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

from vllm_eagle3.checkpoint import CheckpointError, check_draft
from vllm_eagle3.config import KEY, Eagle3Options

logger = logging.getLogger("vllm.eagle3")

WITH_WEIGHTS = ("auto", "hf", "safetensors", "pt")  # values of --load-format that read a checkpoint's files
FORBID_DRAWING = {
    "draft_sample_method", "rejection_sample_method", "use_heterogeneous_vocab", "use_local_argmax_reduction",
    "parallel_drafting",
}  # fmt: skip
"""Keys of the speculative config that decide how drafts are sampled, or that vLLM refuses with drawn drafts."""
_stock = EngineArgs.create_speculative_config


def create_speculative_config(self: EngineArgs, target_model_config: Any, target_parallel_config: Any) -> Any:
    """Replaces the method of this name. `num_speculative_tokens` defaults to the number of the tree's nodes.

    The option `tree: true` also sets it to that number, because it leaves the size of trees to this project. If
    `draft_sample_method` is not given, it follows the option `draft_sampling`.

    Raises:
        CheckpointError: the draft is broken or was made for another target.
        ValueError: a bad option in `additional_config`.
    """
    given = {key.replace("-", "_"): value for key, value in (self.speculative_config or {}).items()}
    if given.get("method", self.spec_method) == "eagle3":
        options = Eagle3Options.from_additional_config(self.additional_config)
        _warn_of_misspelled_key(self.additional_config)
        trees_where_they_pay = ((self.additional_config or {}).get(KEY) or {}).get("tree") is True
        drafts = given.get("num_speculative_tokens", self.spec_tokens)
        if options.tree is not None and (drafts is None or trees_where_they_pay):
            given["num_speculative_tokens"] = options.tree.nodes
        if options.tree is None and options.draft_sampling == "auto" and not FORBID_DRAWING & set(given):
            given["draft_sample_method"] = "probabilistic"
        if given != (self.speculative_config or {}):
            self.speculative_config = given
        draft = given.get("model", self.spec_model)
        if draft is not None and self.load_format in WITH_WEIGHTS and not given.get("parallel_drafting"):
            _check(str(draft), given.get("revision"), target_model_config, options)
    return _stock(self, target_model_config, target_parallel_config)


def _check(draft: str, revision: str | None, target: Any, options: Eagle3Options) -> None:
    folder = _local(draft, revision)
    if folder is None:
        return  # a name on the hub, not downloaded yet: the worker checks it while it loads
    try:
        target_config = get_hf_file_to_dict("config.json", target.model, target.revision)
        check_draft(folder, target_config, options.aux_layers)
    except CheckpointError:
        _show_in_one_line()
        raise


def _local(draft: str, revision: str | None) -> Path | None:
    """The folder of a draft if it is on this machine."""
    if Path(draft).exists() or Path(draft).is_symlink() or draft.startswith(("/", "./", "../", "~")):
        return Path(draft)
    try:
        return Path(snapshot_download(draft, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _warn_of_misspelled_key(additional_config: Any) -> None:
    """Warn of a key that is almost this project's: it is likely a misspelling, and other keys are ignored."""
    for key in additional_config or {}:
        if key != KEY and difflib.get_close_matches(str(key).lower(), [KEY], cutoff=0.75):
            logger.warning("vllm-eagle3: additional_config has a key %r; did you mean %r?", key, KEY)


def _show_in_one_line() -> None:
    """Print an uncaught CheckpointError without its traceback, because its cause is a file and not code."""
    before = sys.excepthook
    if getattr(before, "of_checkpoints", False):
        return

    def excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, CheckpointError):
            sys.stderr.write(f"vllm-eagle3: error: {error}\n")
        else:
            before(kind, error, traceback)

    excepthook.of_checkpoints = True  # type: ignore[attr-defined]
    sys.excepthook = excepthook
