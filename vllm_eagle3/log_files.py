"""Log files for messages that are only of interest if something fails: one per command, in the cache folder."""

import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from vllm_eagle3.config import cache_folder

TAIL = 40
"""Lines of the log that are shown when an engine fails."""


class EngineFailedError(RuntimeError):
    """An engine's process ended early. `log` is the file of its messages."""

    def __init__(self, message: str, log: Path) -> None:
        super().__init__(f"{message}; the whole log: {log}")
        self.log = log

    def tail(self) -> str:
        """The end of the log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "".join(f"{line}\n" for line in lines[-TAIL:])


def log_file(command: str) -> Path:
    """A new file for the messages of `command` and its engines."""
    name = f"{command}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    path = cache_folder() / "logs" / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        path = Path(tempfile.gettempdir()) / f"vllm-eagle3-{name}"
        path.touch()
    return path


def redirect_output(log: Path) -> TextIO:
    """Send all output of this process and its children to `log`. Returns a stream to the previous stderr."""
    console = os.fdopen(os.dup(2), "w", encoding="utf-8")
    with log.open("ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    return console


@contextmanager
def quiet(log: Path, console: TextIO | None = None) -> Iterator[None]:
    """A context in which warnings and the messages of libraries go to `log`.

    This project's own messages go there as well, and to `console` (default: stderr).
    """
    from transformers.utils import logging as of_transformers

    everything, own = logging.getLogger(), logging.getLogger("vllm_eagle3")
    written, shown, level = logging.FileHandler(log), logging.StreamHandler(console), everything.level
    written.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    shown.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    everything.addHandler(written)
    own.addHandler(shown)
    everything.setLevel(logging.INFO)
    logging.captureWarnings(True)
    of_transformers.disable_default_handler()
    of_transformers.enable_propagation()
    of_transformers.disable_progress_bar()
    try:
        yield
    finally:
        of_transformers.enable_progress_bar()
        of_transformers.disable_propagation()
        of_transformers.enable_default_handler()
        logging.captureWarnings(False)
        everything.setLevel(level)
        own.removeHandler(shown)
        everything.removeHandler(written)
        written.close()
