"""Prints one line instead of a traceback for a user's mistake."""

import sys
import traceback
from collections.abc import Callable

from vllm_eagle3.log_files import EngineFailedError

# The exceptions that wrong input raises, here and in the libraries that this project calls. Others are defects.
MISTAKES = (ValueError, OSError, RuntimeError, FloatingPointError, ImportError)
EXIT_MISTAKE = 2


def guarded(work: Callable[[], int | None], command: str, debug: bool) -> int:
    """Run `work` and return its exit code. A user's mistake prints one line to stderr and returns 2.

    If an engine failed, the end of its log is printed as well. `debug` prints the traceback.
    """
    try:
        return work() or 0
    except KeyboardInterrupt:
        message = "interrupted"
    except MISTAKES as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, EngineFailedError):
            sys.stderr.write(error.tail())
        message = " ".join(str(error).split()) or type(error).__name__
    sys.stderr.write(f"vllm-eagle3 {command}: {message}\n")
    return EXIT_MISTAKE
