"""vLLM's scheduler with the cost policy, which chooses the number of drafts of each step.

vLLM's scheduler looks up the number of drafts by batch size (`dynamic_sd_lookup`) and sends it to the workers with the
step. Here an object that asks the policy replaces that table. The same process learns acceptance and step times in
`update_from_output`, so no statistics are sent between processes. See docs/policy.md.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_eagle3.config import Eagle3Options
from vllm_eagle3.policy.cost_file import CostFile
from vllm_eagle3.policy.policy import Policy
from vllm_eagle3.policy.shape import NOTHING, Shape, chains
from vllm_eagle3.runner.draft_scheduler import HURRIED, LIMITED, DraftScheduler, emitted_tokens
from vllm_eagle3.runner.policy_install import cost_key, largest_tree, tree_shapes

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput


def build_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """The scheduler of an engine with the policy, asynchronous if the config says so. A value of `scheduler_cls`."""
    cls = AsyncPolicyScheduler if vllm_config.scheduler_config.async_scheduling else PolicyScheduler
    return cls(vllm_config=vllm_config, **kwargs)


def build_fixed_scheduler(vllm_config: VllmConfig, **kwargs: Any) -> Scheduler:
    """The same without the policy: each step makes all drafts."""
    cls = AsyncDraftScheduler if vllm_config.scheduler_config.async_scheduling else DraftScheduler
    return cls(vllm_config=vllm_config, **kwargs)


def build_policy(vllm_config: VllmConfig) -> tuple[Policy, CostFile]:
    """The policy of a config prepared by `install`, with the costs of earlier runs if there are any, and their file."""
    spec = vllm_config.speculative_config
    assert spec is not None and spec.num_speculative_tokens_per_batch_size is not None, (
        "install was not called"
    )
    options = Eagle3Options.from_additional_config(vllm_config.additional_config)
    sizes = sorted({0, *(size for _, _, size in spec.num_speculative_tokens_per_batch_size)})
    shapes: Sequence[Shape] = chains(sizes)
    if options.tree is not None:
        known = {0: NOTHING, **tree_shapes(vllm_config, options)}
        shapes = [known.get(n) or largest_tree(n, options) for n in sizes]
    file = CostFile(cost_key(vllm_config))
    policy = Policy(file.load(), shapes)
    policy.draws = options.draft_sampling == "auto" or spec.draft_sample_method == "probabilistic"
    return policy, file


def decodes_only(step: SchedulerOutput) -> bool:
    """Whether every request of the step verifies its drafts and one token more: none reads its prompt."""
    if step.scheduled_new_reqs or not step.num_scheduled_tokens:
        return False
    drafts = sum(map(len, step.scheduled_spec_decode_tokens.values()))
    return sum(step.num_scheduled_tokens.values()) == len(step.num_scheduled_tokens) + drafts


class _Lookup:
    """Replaces vLLM's table of drafts by batch size, and asks the policy."""

    def __init__(self, scheduler: PolicyMixin) -> None:
        self.scheduler = scheduler

    def __getitem__(self, batch: int) -> int:
        return self.scheduler.choose(batch)


class PolicyMixin(DraftScheduler):
    """What the policy adds to each of vLLM's two schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.draft_policy, self._cost_file = build_policy(self.vllm_config)
        self._shape = NOTHING
        # For each request: the drafts that it will verify, and the drafts that were scheduled for it.
        self._drafted: dict[str, tuple[int, int]] = {}
        self._hurried = False  # whether this step drafts nothing, so that a first token leaves early
        # Of the last step: batch, shape, context, seconds, verified drafts per request. The policy learns from it when
        # the number of drafts that the step made is known.
        self._unlearned: tuple[int, Shape, float, float, float] | None = None
        self._decoded_only = False  # whether the step before did nothing but decode
        # A step whose requests verify different numbers of drafts cannot use full graphs, which need uniform batches.
        self._ragged = not self.vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        self.draft_policy.follows_requests = self._ragged
        self.dynamic_sd_lookup = _Lookup(self)  # type: ignore[assignment]

    def add_request(self, request: Any) -> None:
        """Tell the policy whether the request samples."""
        params = request.sampling_params
        if params is not None and params.temperature > 0:
            self.draft_policy.sampling.add(request.request_id)
        super().add_request(request)

    def choose(self, batch: int) -> int:
        """Drafts per request in the step that is being scheduled. `schedule` calls this instead of vLLM's table."""
        most = self.largest_limit()
        self._hurried = not self._hurried and self._first_token_is_due()
        self._fallbacks[HURRIED] += self._hurried
        self._fallbacks[LIMITED] += batch * (most == 0)
        if most == 0 or self._hurried:
            self._shape = NOTHING
            return 0
        self.draft_policy.doubtful = self.draft_is_useless
        sampling = sum(request.request_id in self.draft_policy.sampling for request in self.running)
        self.draft_policy.expect(sampling / max(len(self.running), 1))
        reads_no_prompt = all(r.num_computed_tokens >= r.num_prompt_tokens for r in self.running)
        self.draft_policy.countable = reads_no_prompt and self._decoded_only
        self._shape = self.draft_policy.choose(batch, self._context())
        if most is not None and most < self._shape.nodes:
            self._shape = next(shape for shape in reversed(self.draft_policy.shapes) if shape.nodes <= most)
            self._fallbacks[LIMITED] += batch
        return self._shape.nodes

    def _first_token_is_due(self) -> bool:
        """Whether this step can end a prompt, whose first token would wait until the whole batch has drafted.

        Only with synchronous scheduling: otherwise tokens leave before drafts are made. Where every step ends a prompt,
        every second one drafts. vLLM does not say here how many tokens of each request it schedules, so a step whose
        budget other requests have used up may count too.
        """
        if self.scheduler_config.async_scheduling:
            return False
        most = self.scheduler_config.long_prefill_token_threshold or self.max_num_scheduled_tokens
        return any(
            request.num_output_tokens == 0
            and 0 < request.num_prompt_tokens - request.num_computed_tokens <= most
            for request in self.running
        )

    def is_tree(self, drafts: int) -> bool:
        return self.draft_policy.by_nodes[drafts].family > 0

    def _context(self) -> float:
        return sum(r.num_computed_tokens for r in self.running) / max(len(self.running), 1)

    def cut_drafts(self, requests: list[str], drafted: list[int]) -> dict[str, int]:
        """How many drafts of this step to verify, for the requests that will not verify all of `drafted`."""
        if not requests or self._shape == NOTHING:
            return {}  # asynchronous scheduling makes a step without requests when all have ended
        cut = super().cut_drafts(requests, drafted)
        if self._ragged or self.draft_policy.probing:
            lengths = self.draft_policy.lengths(requests, self._shape, self._context(), drafted)
            for request, length, n in zip(requests, lengths, drafted, strict=True):
                if length < n:
                    cut[request] = min(length, cut.get(request, length))
        self._cut_trees.difference_update(requests)
        if self._shape.family:
            self._cut_trees.update(cut)
        return cut

    def keep_drafts(self, draft_token_ids: DraftTokenIds) -> None:
        """Keep those drafts of each request that are worth verifying."""
        requests, drafts = draft_token_ids.req_ids, draft_token_ids.draft_token_ids
        scheduled, drafted = self._shape.nodes, [len(ids) for ids in drafts]
        if max(drafted, default=0) > scheduled:
            # Near the longest sequence vLLM sends zeros that are not drafts.
            drafted = [0] * len(requests)
        elif self._unlearned is not None:
            self._learn(drafted)
        cut = self.cut_drafts(requests, drafted)
        for request, ids, length in zip(requests, drafts, drafted, strict=True):
            kept = cut.get(request, length)
            del ids[kept:]
            self._drafted[request] = (kept, kept if request in cut else scheduled)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, Any]:
        """Learn from the step, then let vLLM handle it."""
        self._unlearned = None
        self._observe_acceptance(scheduler_output, model_runner_output)
        if self._last_step is not None:
            self._observe_seconds(scheduler_output, time.perf_counter() - self._last_step)
        self._decoded_only = decodes_only(scheduler_output)
        for request in scheduler_output.finished_req_ids:
            self.draft_policy.forget(request)
            self._drafted.pop(request, None)
            self._cut_trees.discard(request)
        if self.scheduler_config.async_scheduling and self._unlearned is not None:
            batch = len(scheduler_output.num_scheduled_tokens)
            self._learn([scheduler_output.num_spec_tokens_to_schedule] * batch)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._cost_file.save_when_due(self.draft_policy.cost, idle=not self.running)
        return outputs

    def _observe_acceptance(self, step: SchedulerOutput, output: ModelRunnerOutput) -> None:
        invalid, drafts = step.num_invalid_spec_tokens or {}, step.scheduled_spec_decode_tokens
        emitted = emitted_tokens(step, output)
        results = {r: (len(drafts[r]), n - 1) for r, n in emitted.items()}
        for request in (self._drafted.keys() | invalid.keys()) & results.keys():
            verified = len(drafts[request]) - invalid.get(request, 0)
            expected, scheduled = self._drafted.get(request, (verified, verified))
            # If a chain stopped early, the drafts that were not made count as not accepted.
            results[request] = (scheduled if verified == expected else verified, results[request][1])
        for request in getattr(step, "cut_trees", self._cut_trees) & results.keys():  # no shapes of the menu
            del results[request]
        self.draft_policy.observe_accepted(results)

    def _observe_seconds(self, step: SchedulerOutput, seconds: float) -> None:
        """Keep the time of a pure decode step after another whose drafted and verified counts match for every request.

        On a GPU the results leave the device before the step drafts. So the time between the results of two steps holds
        what the former drafted, with the draft's pass over all rows of that former step, and what the latter verified.
        On a CPU it holds both of the latter step. Under this rule it is the same work either way.
        """
        drafts, tokens = step.num_spec_tokens_to_schedule, step.num_scheduled_tokens
        if not (self._decoded_only and decodes_only(step)):
            return
        if self._drafted:
            same = all((n - 1, drafts) == self._drafted.get(r, (drafts, drafts)) for r, n in tokens.items())
        else:
            same = set(tokens.values()) == {drafts + 1}
        if same:
            shape = self.draft_policy.by_nodes[drafts]
            verified = sum(tokens.values()) / len(tokens) - 1
            self._unlearned = (len(tokens), shape, self._context(), seconds, verified)

    def _learn(self, lengths: list[int]) -> None:
        """Pass the last step to the policy, when the number of drafts that it made for each request is known."""
        assert self._unlearned is not None
        shape = self._unlearned[1]
        self.draft_policy.observe_lengths(shape, lengths)
        self.draft_policy.observe_seconds(*self._unlearned, min(max(lengths), shape.depth))
        self._unlearned = None

    def shutdown(self) -> None:
        """Save the learned step times for the next start."""
        self._cost_file.save(self.draft_policy.cost)
        super().shutdown()


class PolicyScheduler(PolicyMixin):
    """vLLM's synchronous scheduler with the policy."""


class AsyncDraftScheduler(DraftScheduler, AsyncScheduler):
    """vLLM's asynchronous scheduler. Drafts are placeholders, which are cut before they are known."""

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        requests = list(scheduler_output.num_scheduled_tokens)
        told = scheduler_output.num_spec_tokens_to_schedule
        # What this step verifies was cut in the last one; the next results are read after the next cut.
        scheduler_output.cut_trees = frozenset(self._cut_trees)  # type: ignore[attr-defined]
        cut = self.cut_drafts(requests, [told] * len(requests))
        for request, length in cut.items():
            drafts = self.requests[request].spec_token_ids
            self.requests[request].spec_token_ids = drafts[:length]


class AsyncPolicyScheduler(PolicyMixin, AsyncDraftScheduler):
    """vLLM's asynchronous scheduler with the policy."""
