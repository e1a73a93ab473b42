"""Requests that all end in the same step: asynchronous scheduling then schedules a step without requests."""

from typing import Any

from engines import token_ids


def assert_every_number_of_requests_drains(llm: Any) -> None:
    """Run 1 to 4 requests of equal length to their end, for each shape of the engine's policy.

    The test makes the policy's choice. With a draft that is never accepted the policy would soon choose no drafts, and
    a step without requests is only a difficult case if drafts are pending.
    """
    from vllm import SamplingParams
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    assert isinstance(scheduler, AsyncScheduler)
    empty, update = [], scheduler._update_after_schedule

    def counted(step: Any) -> None:
        if not step.num_scheduled_tokens:
            empty.append(scheduler._shape)
        update(step)

    scheduler._update_after_schedule = counted
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, detokenize=False)
    for shape in scheduler.draft_policy.shapes:
        scheduler.draft_policy.choose = lambda batch, context, shape=shape: shape
        for requests in (1, 2, 4):
            prompts = [[3, 9, 27 + i] for i in range(requests)]
            assert [len(ids) for ids in token_ids(llm, prompts, params)] == [6] * requests
    assert set(empty) == set(scheduler.draft_policy.shapes), "each was met by a step without requests"
