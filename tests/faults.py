"""What can break, and what the user sees: the tables of docs/serving.md, made from the tests that show it."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "checkpoint"))

from dialects import Dims, draft_tensors, target_config, write_dialect
from test_broken_drafts import broken_drafts

from vllm_eagle3.checkpoint import CheckpointError, check_draft

# What happens -> (what the user sees, the test that shows it).
WHILE_SERVING = {
    "the cost file is garbage, of another format, too large, a folder or a pipe": (
        "one warning with path and reason; the costs are learned again and the file is rewritten",
        "policy/test_cost_file.py, runner/test_policy_scheduler.py",
    ),
    "its folder cannot be made or written, or the disk is full": (
        "one warning with path and reason; the engine serves and stops as ever, an older file stays whole",
        "policy/test_cost_file.py",
    ),
    "there is no home directory": ("one warning that says to set XDG_CACHE_HOME", "policy/test_cost_file.py"),
    "the clock jumps back": ("nothing: the file is saved all the same", "policy/test_cost_file.py"),
    "the server is killed without time to stop": (
        "what was learned was saved when the engine last became idle",
        "runner/test_policy_scheduler.py",
    ),
    "the engine's process is killed": (
        "requests get an error (500 or a closed connection), and the server ends, as vLLM does",
        "e2e/test_stopping.py",
    ),
    "the draft computes NaN": (
        "the same text; after 200 drafts one warning, and policy auto probes in about one step of 70",
        "runner/test_drills.py",
    ),
    "a draft for another model, of the same sizes": (
        "the same",
        "runner/test_spec_metrics.py",
    ),
    "the KV cache is full": ("requests wait or are computed again; the same text", "runner/test_drills.py"),
    "clients leave in mid-stream, requests are aborted": (
        "the others are answered as ever",
        "runner/test_drills.py, e2e/test_openai.py",
    ),
    "asynchronous scheduling runs out of requests": (
        "nothing",
        "runner/test_policy_scheduler.py, runner/v2/test_async.py",
    ),
    "top_k without top_p at T > 0 on a CPU": (
        "an answer",
        "runner/v1/test_sampling_matrix.py, e2e/test_openai.py",
    ),
    "a seed at T > 0 with a prompt of several steps on a CPU": (
        "an answer",
        "runner/v1/test_sampling_matrix.py",
    ),
    "eagle3_max_draft_tokens is no integer from 0 to K": (
        "400, and what is allowed",
        "runner/test_request_limit.py, e2e/test_serve.py",
    ),
    "a tree on the V1 runner": (
        "refused before anything starts, with the reason why the engine gets that runner",
        "runner/test_front_end.py",
    ),
    "a misspelled option, a value out of range": (
        "refused before anything starts, with what is valid",
        "test_config.py",
    ),
    "a misspelled key of additional_config": (
        "one warning: did you mean 'eagle3'?",
        "runner/test_front_end.py",
    ),
}


def broken_drafts_table() -> str:
    """Fault -> the message, with the draft's folder written DRAFT."""
    dims = Dims()
    rows = ["| the draft | what the user reads |", "| --- | --- |"]
    for what, (change, _, _) in broken_drafts().items():
        with tempfile.TemporaryDirectory() as folder:
            draft = write_dialect(
                Path(folder) / "draft", "safeailab", draft_tensors(dims), dims, aux_layers=(3, 6, 11)
            )
            change(draft)
            try:
                check_draft(draft, target_config(dims))
            except CheckpointError as error:
                text = str(error).replace(str(draft), "DRAFT").replace("|", "\\|")
                rows.append(f"| {what} | `{text}` |")
    return "\n".join(rows) + "\n"


def while_serving_table() -> str:
    """Fault -> what the user sees, and the test that shows it."""
    rows = ["| what happens | what the user sees | shown by `tests/` |", "| --- | --- | --- |"]
    rows += [f"| {what} | {seen} | {test} |" for what, (seen, test) in WHILE_SERVING.items()]
    return "\n".join(rows) + "\n"


TABLES = {"broken drafts": broken_drafts_table, "while serving": while_serving_table}


def replaced(text: str) -> str:
    """`text` of docs/serving.md with its tables made anew."""
    for name, table in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = text.split(start)
        text = before + start + table() + end + rest.split(end, 1)[1]
    return text


if __name__ == "__main__":
    page = Path(__file__).parents[1] / "docs" / "serving.md"
    page.write_text(replaced(page.read_text(encoding="utf-8")), encoding="utf-8")
