"""What this project adds to vLLM's scheduler with any policy.

It adds a request's own limit of drafts, statistics for operators, and a warning if hardly any draft is accepted.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.scheduler import Scheduler

from vllm_eagle3.config import Eagle3Options
from vllm_eagle3.policy.shape import shape_name
from vllm_eagle3.runner.hooks.spec_metrics import Eagle3Stats
from vllm_eagle3.runner.request_limit import limit_of

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput

logger = logging.getLogger("vllm.eagle3")

# Reasons of fall-backs.
LIMITED, USELESS, HURRIED = (
    "a request limits its drafts",
    "the draft is of no use",
    "a first token comes first",
)
WATCHED_DRAFTS, WATCHED_VERIFICATIONS = 200, 50  # the draft is judged after at least this many
USEFUL = 0.02  # the fewest accepted drafts per verification of a useful draft


def emitted_tokens(step: SchedulerOutput, output: ModelRunnerOutput) -> dict[str, int]:
    """How many tokens each request emitted that verified drafts; requests without a result are left out."""
    sampled, index = output.sampled_token_ids, output.req_id_to_index
    if not sampled:
        return {}
    found = {r: len(sampled[index[r]]) for r in step.scheduled_spec_decode_tokens if r in index}
    return found if all(found.values()) else {r: n for r, n in found.items() if n}


class DraftScheduler(Scheduler):
    """Limits the verified drafts of each request to its own limit, and counts drafts and accepted drafts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        options = Eagle3Options.from_additional_config(self.vllm_config.additional_config)
        self._tree = options.tree is not None
        self._start_counting()

    def _start_counting(self) -> None:
        self._limits: dict[str, int] = {}  # limits of the requests that set one
        self._steps: Counter[str] = Counter()  # by the shape that each request was told to draft
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._fallbacks: Counter[str] = Counter()
        self._cut_trees: set[str] = set()  # requests that verify less than the tree drafted for them
        self._grafts: Counter[str] = Counter()  # tokens of grafts that were verified and accepted
        self._last_step: float | None = None  # None: the engine was idle since
        # Verifications, drafts and accepted drafts since the last judgement.
        self._watched: Counter[str] = Counter()
        self._warned = self.draft_is_useless = False

    def add_request(self, request: Any) -> None:
        """Keep the limit of drafts that the request sets."""
        limit = limit_of(request.sampling_params)
        if limit is not None:
            self._limits[request.request_id] = limit
        super().add_request(request)

    def largest_limit(self) -> int | None:
        """The most drafts that any running request allows; None if one of them sets no limit."""
        if not self._limits:
            return None
        limits = [self._limits.get(request.request_id) for request in self.running]
        known = [limit for limit in limits if limit is not None]
        return max(known) if known and len(known) == len(limits) else None

    def cut_drafts(self, requests: list[str], drafted: list[int]) -> dict[str, int]:
        """How many drafts each request will verify, for the requests that will not verify all of `drafted`."""
        if not self._limits:
            return {}
        limited = {
            r: self._limits[r] for r, n in zip(requests, drafted, strict=True) if n > self._limits.get(r, n)
        }
        self._fallbacks[LIMITED] += len(limited)
        return limited

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """With synchronous scheduling: take the drafts that the workers made."""
        # Told by runner.v2.cpu_speculator.StoppedChains.
        verified, accepted = getattr(draft_token_ids, "grafts", None) or (0, 0)
        self._grafts.update(verified=verified, accepted=accepted)
        self.keep_drafts(draft_token_ids)
        super().update_draft_token_ids(draft_token_ids)

    def keep_drafts(self, draft_token_ids: DraftTokenIds) -> None:
        """Keep of each request's drafts those that will be verified."""
        requests, drafts = draft_token_ids.req_ids, draft_token_ids.draft_token_ids
        for request, kept in self.cut_drafts(requests, [len(ids) for ids in drafts]).items():
            del drafts[requests.index(request)][kept:]

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, Any]:
        """Count the step, then let vLLM handle it."""
        now = time.perf_counter()
        if scheduler_output.num_scheduled_tokens:
            drafts = scheduler_output.num_spec_tokens_to_schedule
            shape = shape_name(drafts, self.is_tree(drafts))
            self._steps[shape] += 1
            if self._last_step is not None:
                self._seconds[shape] += now - self._last_step
        self._watch(scheduler_output, model_runner_output)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for request in [request for request in self._limits if request not in self.requests]:
            del self._limits[request]
        self._last_step = now if self.running else None
        return outputs

    def is_tree(self, drafts: int) -> bool:
        """Whether a step with this number of drafts per request grows trees."""
        return self._tree

    def _watch(self, step: SchedulerOutput, output: ModelRunnerOutput) -> None:
        """Judge the draft whenever there are enough new drafts. Warn once if hardly any of them was accepted."""
        seen = self._watched
        counts = emitted_tokens(step, output)
        seen["verifications"] += len(counts)
        seen["drafts"] += sum(len(step.scheduled_spec_decode_tokens[request]) for request in counts)
        seen["accepted"] += sum(counts.values()) - len(counts)
        if seen["drafts"] < WATCHED_DRAFTS or seen["verifications"] < WATCHED_VERIFICATIONS:
            return
        self.draft_is_useless = seen["accepted"] < USEFUL * seen["verifications"]
        if self.draft_is_useless:
            self._fallbacks[USELESS] += 1
            self._warn()
        seen.clear()

    def _warn(self) -> None:
        if self._warned:
            return
        self._warned = True
        spec = self.vllm_config.speculative_config
        assert spec is not None and spec.draft_model_config is not None
        logger.warning(
            "vllm-eagle3: of the last %d drafts %d were accepted: %s is probably no draft for %s, or reads other "
            "layers than it was trained on (option aux_layers). `vllm-eagle3 doctor --target TARGET --draft DRAFT` "
            "says whether they fit",
            self._watched["drafts"],
            self._watched["accepted"],
            spec.draft_model_config.model,
            self.vllm_config.model_config.model,
        )

    def make_stats(self, spec_decoding_stats: Any = None, *args: Any, **kwargs: Any) -> Any:
        """vLLM's statistics of a step, with this class's counts since the last ones."""
        stats = super().make_stats(spec_decoding_stats, *args, **kwargs)
        if stats is not None and (self._steps or spec_decoding_stats is not None):
            own: Any = spec_decoding_stats or Eagle3Stats.new(self.num_spec_tokens)
            own.steps, own.seconds = dict(self._steps), dict(self._seconds)
            own.fallbacks = {reason: n for reason, n in self._fallbacks.items() if n}
            own.grafts = {kind: n for kind, n in self._grafts.items() if n}
            stats.spec_decoding_stats = own
            for counted in (self._steps, self._seconds, self._fallbacks, self._grafts):
                counted.clear()
        return stats

    def make_spec_decoding_stats(self, spec_decoding_stats: Any, *args: Any, **kwargs: Any) -> Any:
        """vLLM's statistics of speculation in a step, as an `Eagle3Stats`."""
        if self.log_stats and spec_decoding_stats is None:
            spec_decoding_stats = Eagle3Stats.new(self.num_spec_tokens)
        return super().make_spec_decoding_stats(spec_decoding_stats, *args, **kwargs)
