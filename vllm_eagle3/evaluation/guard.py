"""A mistake of the user ends in one line, and not in a traceback."""

import sys
import traceback
from collections.abc import Callable

from vllm_eagle3.log_files import EngineFailedError

# The exceptions that wrong input raises, here and in the libraries that this project calls. Others are defects.
MISTAKES = (ValueError, OSError, RuntimeError, FloatingPointError, ImportError)
EXIT_MISTAKE = 2


def guarded(work: Callable[[], int | None], command: str, debug: bool) -> int:
    """Exit code of `work`; a mistake of the user ends in one line on stderr and code 2.

    An engine that failed also shows the end of its log. `debug` shows the traceback.
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
