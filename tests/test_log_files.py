"""Which messages a quiet command prints and which it writes to its log (5 s)."""

import subprocess
import sys
import tempfile
from pathlib import Path

from vllm_eagle3.log_files import log_file

TALK = """
import logging, pathlib, sys, warnings
from vllm_eagle3.log_files import quiet, redirect_output
log = pathlib.Path(sys.argv[1])
console = redirect_output(log) if len(sys.argv) > 2 else None
with quiet(log, console):
    from transformers.utils import logging as of_transformers
    warnings.warn("old name", FutureWarning)
    of_transformers.get_logger("transformers.models").warning("odd checkpoint")
    logging.getLogger("datasets").info("cached")
    logging.getLogger("vllm_eagle3.training").info("step 1")
    print("a print")
"""


def talk(log: Path, *more: str) -> tuple[str, str, str]:
    """(stdout, stderr, log) of a process that warns, logs and prints."""
    done = subprocess.run(
        [sys.executable, "-c", TALK, str(log), *more], capture_output=True, text=True, check=True
    )
    return done.stdout, done.stderr, log.read_text()


def test_warnings_and_libraries_go_to_the_log(tmp_path: Path) -> None:
    out, err, log = talk(tmp_path / "log")
    assert (out, err) == ("a print\n", "INFO step 1\n")
    assert all(text in log for text in ("old name", "odd checkpoint", "cached", "step 1"))


def test_redirected_output_leaves_only_what_the_project_logs(tmp_path: Path) -> None:
    out, err, log = talk(tmp_path / "log", "redirect")
    assert (out, err) == ("", "INFO step 1\n")
    assert all(text in log for text in ("old name", "odd checkpoint", "cached", "step 1", "a print"))


def test_where_the_cache_folder_cannot_be_written_the_log_is_a_temporary_file(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert log_file("eval").parent == tmp_path
