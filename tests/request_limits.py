"""Requests that limit their drafts beside others that do not, on either runner."""

from typing import Any

import pytest


def assert_limits_are_kept(llm: Any, most: int) -> None:
    """Runs requests with limits 0, 1 and none together, then those with a limit alone; the text never changes."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    verified: dict[str, set[int]] = {}
    update = scheduler.update_from_output

    def noted(step: Any, output: Any) -> Any:
        for request in step.num_scheduled_tokens:
            drafts = len(step.scheduled_spec_decode_tokens.get(request, ()))
            verified.setdefault(request.split("-")[0], set()).add(drafts)
        return update(step, output)

    scheduler.update_from_output = noted
    if hasattr(scheduler, "draft_policy"):
        largest = scheduler.draft_policy.shapes[-1]
        scheduler.draft_policy.choose = lambda batch, *_: largest
        scheduler.draft_policy.lengths = lambda requests, shape, context, drafted: drafted

    def run(limits: list[int | None]) -> list[list[int]]:
        verified.clear()
        params = [
            SamplingParams(
                temperature=0, max_tokens=14, ignore_eos=True, detokenize=False,
                extra_args=None if limit is None else {"eagle3_max_draft_tokens": limit},
            )
            for limit in limits
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": [3, 9, 27 + i]} for i in range(len(limits))]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def seen() -> list[int]:
        """The most drafts of each request, in the order in which they came."""
        return [max(verified[request]) for request in sorted(verified, key=int)]

    expected = run([0, 0, 0, 0])
    assert seen() == [0, 0, 0, 0]
    assert run([0, None, 1, None]) == expected
    assert seen() == [0, most, 1, most]
    assert run([1, 1, 0, 1]) == expected
    assert seen() == [1, 1, 0, 1]
    assert not scheduler._limits, "finished requests are forgotten"
    with pytest.raises(VLLMValidationError, match=f"from 0 .* to {most}"):
        run([most + 1])
    assert run([None]) == expected[:1]
