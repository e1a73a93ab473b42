"""The most drafts of a request that are verified in a step: `eagle3_max_draft_tokens` among its extra arguments.

`extra_body={"vllm_xargs": {"eagle3_max_draft_tokens": 0}}` in the openai client, `SamplingParams(extra_args={...})`
in Python. 0 switches drafting off for the request.
"""

from typing import Any

from vllm.exceptions import VLLMValidationError

LIMIT = "eagle3_max_draft_tokens"


def limit_of(params: Any) -> int | None:
    """The limit in a request's sampling parameters; None if it sets none."""
    return (getattr(params, "extra_args", None) or {}).get(LIMIT)


def check_limit(params: Any, most: int) -> None:
    """Raise VLLMValidationError, for which the server returns status 400, unless the limit is from 0 to `most`."""
    limit = limit_of(params)
    if limit is None:
        return
    if not isinstance(limit, int) or isinstance(limit, bool) or not 0 <= limit <= most:
        raise VLLMValidationError(
            f"{LIMIT}: expected an integer from 0 (no drafts) to {most} (num_speculative_tokens), found {limit!r:.100}",
            parameter=LIMIT,
            value=limit,
        )
