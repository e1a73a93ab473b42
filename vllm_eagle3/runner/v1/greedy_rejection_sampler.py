"""The V1 runner's rejection sampler, with a faster path for greedy requests on a CPU."""

from typing import Any

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor.builtin import LogitBiasLogitsProcessor, MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID, RejectionSampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata


class GreedyRejectionSampler(RejectionSampler):
    """Computes only the argmax of the logits if it decides every token.

    Upstream copies the logits of all rows three times (as fp32, split into verified and bonus rows, cloned for
    processors) before it takes their argmax. On a CPU the copies cost more than the argmax.
    """

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> Any:
        """SamplerOutput with sampled_token_ids [batch, max drafts + 1], with -1 after each request's last token."""
        if logits.device.type != "cpu" or self.synthetic_mode or not argmax_decides(sampling_metadata):
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        best, drafts = self.sampler.greedy_sample(logits.float()).tolist(), metadata.draft_token_ids.tolist()
        rows, start, first = [], 0, 0  # indices of a request's first row of logits and first draft
        for count in metadata.num_draft_tokens:
            own = best[start : start + count + 1]
            accepted = next((i for i in range(count) if own[i] != drafts[first + i]), count)
            rows.append(own[: accepted + 1] + [PLACEHOLDER_TOKEN_ID] * (metadata.max_spec_len - accepted))
            start, first = start + count + 1, first + count
        output = torch.tensor(rows, dtype=torch.int32)
        return SamplerOutput(sampled_token_ids=output, logprobs_tensors=None)


def argmax_decides(sampling: SamplingMetadata) -> bool:
    """Whether all requests are greedy, nothing changes their logits, and none of them asks for logprobs."""
    thinking = sampling.thinking_budget_state_holder
    return (
        sampling.all_greedy
        and sampling.max_num_logprobs is None
        and not sampling.logprob_token_ids
        and sampling.no_penalties
        and sampling.allowed_token_ids_mask is None
        and not sampling.bad_words_token_ids
        and not (thinking is not None and thinking.has_tracked_requests())
        and all(map(_idle, sampling.logitsprocs.non_argmax_invariant))
    )


def _idle(processor: Any) -> bool:
    """Whether a logits processor changes nothing in this step. This is known only for vLLM's own processors."""
    if type(processor) is MinTokensLogitsProcessor:
        return not processor.min_toks
    return type(processor) is LogitBiasLogitsProcessor and not processor.biases
