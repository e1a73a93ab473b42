"""CPU forms of the kernels of vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils.

Tables with one result per block of the vocabulary have the result of a whole row in block 0, see `rows`.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from vllm_eagle3.kernels._numba import jit
from vllm_eagle3.runner.v2.cpu.gumbel import noised_argmax
from vllm_eagle3.runner.v2.cpu.philox import uniform
from vllm_eagle3.runner.v2.cpu.rows import NEG_INF, best, write

UPSTREAM = "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils"


class Distributions(NamedTuple):
    """The target's distributions at all rows of a batch and, for probabilistic drafts, the draft's."""

    target_logits: torch.Tensor  # [rows, vocab]
    target_max: torch.Tensor  # [rows, blocks]
    target_sumexp: torch.Tensor  # [rows, blocks]
    draft_logits: torch.Tensor | None  # [max_num_reqs, steps, vocab], before temperature
    draft_max: torch.Tensor  # [rows, blocks]
    draft_sumexp: torch.Tensor  # [rows, blocks]

    def target_lse(self, row: int) -> torch.Tensor:
        return self.target_max[row, 0] + self.target_sumexp[row, 0].log()

    def draft_lse(self, row: int) -> torch.Tensor:
        """Log-sum-exp of the draft's logits; 0 for drafts without a distribution, whose probability is 1."""
        if self.draft_logits is None:
            return torch.zeros(())
        return self.draft_max[row, 0] + self.draft_sumexp[row, 0].log()

    def log_probs(self, row: int, request: int, step: int, temp: Any, token: Any) -> tuple[Any, Any]:
        """Log-probabilities of `token` (an id or a slice of ids) under target and draft."""
        target = self.target_logits[row, token].float() - self.target_lse(row)
        if self.draft_logits is None:
            return target, torch.zeros(())
        return target, self.draft_logits[request, step, token].float() / temp - self.draft_lse(row)


def _compute_local_logits_stats_kernel(
    target_local_argmax_ptr, target_local_argmax_stride, target_local_max_ptr, target_local_max_stride,
    target_local_sumexp_ptr, target_local_sumexp_stride, draft_local_max_ptr, draft_local_max_stride,
    draft_local_sumexp_ptr, draft_local_sumexp_stride, target_logits_ptr, target_logits_stride, draft_logits_ptr,
    draft_logits_stride_0, draft_logits_stride_1, expanded_idx_mapping_ptr, expanded_local_pos_ptr, temp_ptr,
    vocab_size, num_speculative_steps, BLOCK_SIZE, HAS_DRAFT_LOGITS,
):  # fmt: skip
    """Write each row's largest logit and its token, and for requests that sample the sum of exponentials."""
    logits = target_logits_ptr[:, :vocab_size]
    value, index = best(logits)
    write(target_local_max_ptr, value, NEG_INF)
    write(target_local_argmax_ptr, index, 0)
    temps = temp_ptr[expanded_idx_mapping_ptr].float()
    rows = ((temps != 0) & (expanded_local_pos_ptr < num_speculative_steps)).nonzero().flatten()
    if not len(rows):
        return
    for table in (target_local_sumexp_ptr, draft_local_sumexp_ptr):
        table.zero_()
    target_local_sumexp_ptr[rows, 0] = _sumexp(logits[rows].float(), value[rows])
    if HAS_DRAFT_LOGITS:
        drafts = draft_logits_ptr[
            expanded_idx_mapping_ptr[rows], expanded_local_pos_ptr[rows].long(), :vocab_size
        ]
        drafts = drafts.float() / temps[rows, None]
        draft_local_max_ptr.fill_(NEG_INF)
        draft_local_max_ptr[rows, 0] = drafts.amax(dim=-1)
        draft_local_sumexp_ptr[rows, 0] = _sumexp(drafts, draft_local_max_ptr[rows, 0])


def _sumexp(logits: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Sum of exp(logit - largest) of each row; 0 for a row of -inf."""
    return (logits - largest[:, None]).exp().sum(dim=-1).masked_fill(largest == NEG_INF, 0.0)


def _compute_cumulative_log_p_kernel(
    cumulative_log_p_ptr, target_logits_ptr, target_logits_stride, target_local_max_ptr, target_local_max_stride,
    target_local_sumexp_ptr, target_local_sumexp_stride, draft_sampled_ptr, draft_logits_ptr, draft_logits_stride_0,
    draft_logits_stride_1, draft_local_max_ptr, draft_local_max_stride, draft_local_sumexp_ptr,
    draft_local_sumexp_stride, cu_num_logits_ptr, idx_mapping_ptr, temp_ptr, vocab_num_blocks,
    PADDED_VOCAB_NUM_BLOCKS, HAS_DRAFT_LOGITS, num_warps=1,
):  # fmt: skip
    """Block verification: write the log of the ratio of target to draft for all drafts up to each one, at most 0."""
    seen = Distributions(
        target_logits_ptr, target_local_max_ptr, target_local_sumexp_ptr, draft_logits_ptr, draft_local_max_ptr,
        draft_local_sumexp_ptr,
    )  # fmt: skip
    firsts, drafts = cu_num_logits_ptr.tolist(), draft_sampled_ptr.tolist()
    for i, request in enumerate(idx_mapping_ptr.tolist()):
        temp, log_p = temp_ptr[request].float(), torch.zeros(())
        if temp == 0:
            continue
        for step, row in enumerate(range(firsts[i], firsts[i + 1] - 1)):
            if drafts[row + 1] >= 0:
                target, draft = seen.log_probs(row, request, step, temp, drafts[row + 1])
                log_p = (log_p + (target - draft)).clamp(max=0.0)
            cumulative_log_p_ptr[row] = log_p


def _compute_local_residual_mass_kernel(
    local_residual_mass_ptr, local_residual_mass_stride, cumulative_log_p_ptr, target_logits_ptr, target_logits_stride,
    target_local_max_ptr, target_local_max_stride, target_local_sumexp_ptr, target_local_sumexp_stride,
    draft_logits_ptr, draft_logits_stride_0, draft_logits_stride_1, draft_local_max_ptr, draft_local_max_stride,
    draft_local_sumexp_ptr, draft_local_sumexp_stride, draft_sampled_ptr, expanded_idx_mapping_ptr,
    expanded_local_pos_ptr, temp_ptr, vocab_size, num_speculative_steps, vocab_num_blocks, BLOCK_SIZE,
    PADDED_VOCAB_NUM_BLOCKS,
):  # fmt: skip
    """Block verification: write how much of the target's probability at each position the draft does not cover."""
    seen = Distributions(
        target_logits_ptr, target_local_max_ptr, target_local_sumexp_ptr, draft_logits_ptr, draft_local_max_ptr,
        draft_local_sumexp_ptr,
    )  # fmt: skip
    local_residual_mass_ptr.zero_()
    steps, drafts = expanded_local_pos_ptr.tolist(), draft_sampled_ptr.tolist()
    for row, request in enumerate(expanded_idx_mapping_ptr.tolist()[:-1]):
        temp = temp_ptr[request].float()
        if not 0 < steps[row] < num_speculative_steps or drafts[row + 1] < 0 or temp == 0:
            continue
        target, draft = seen.log_probs(row, request, steps[row], temp, slice(vocab_size))
        uncovered = cumulative_log_p_ptr[row - 1].exp() * target.exp() - draft.exp()
        local_residual_mass_ptr[row, 0] = uncovered.clamp(min=0).sum()


def _rejection_kernel(
    sampled_ptr, sampled_stride, rejected_steps_ptr, target_rejected_logsumexp_ptr, draft_rejected_logsumexp_ptr,
    target_logits_ptr, target_logits_stride, target_local_argmax_ptr, target_local_argmax_stride, target_local_max_ptr,
    target_local_max_stride, target_local_sumexp_ptr, target_local_sumexp_stride, draft_sampled_ptr, draft_logits_ptr,
    draft_logits_stride_0, draft_logits_stride_1, draft_local_max_ptr, draft_local_max_stride, draft_local_sumexp_ptr,
    draft_local_sumexp_stride, cu_num_logits_ptr, idx_mapping_ptr, temp_ptr, seed_ptr, pos_ptr,
    synthetic_conditional_rates_ptr, cumulative_log_p_ptr, local_residual_mass_ptr, local_residual_mass_stride,
    vocab_num_blocks, PADDED_VOCAB_NUM_BLOCKS, HAS_DRAFT_LOGITS, SYNTHETIC_MODE, USE_BLOCK_VERIFICATION, num_warps=1,
):  # fmt: skip
    """Write each request's accepted drafts and their number. Greedy requests also get the token after them."""
    temps = temp_ptr[idx_mapping_ptr].float()
    best_tokens = target_local_argmax_ptr[:, 0]
    if not SYNTHETIC_MODE and not temps.any():
        arrays = (sampled_ptr, rejected_steps_ptr, best_tokens, draft_sampled_ptr, cu_num_logits_ptr)
        return _accept_greedily(*(tensor.numpy() for tensor in arrays))
    seen = Distributions(
        target_logits_ptr, target_local_max_ptr, target_local_sumexp_ptr, draft_logits_ptr, draft_local_max_ptr,
        draft_local_sumexp_ptr,
    )  # fmt: skip
    firsts, drafts = cu_num_logits_ptr.tolist(), draft_sampled_ptr.tolist()
    rates = synthetic_conditional_rates_ptr if SYNTHETIC_MODE else None
    for i, request in enumerate(idx_mapping_ptr.tolist()):
        rows, seed = range(firsts[i], firsts[i + 1] - 1), int(seed_ptr[request])
        chances = [uniform(seed, int(pos_ptr[row])) for row in rows]
        own = drafts[firsts[i] + 1 : firsts[i + 1]]
        if temps[i] == 0:
            tokens, accepted = _verify_greedily(
                own, best_tokens[rows.start : rows.stop].tolist(), chances, rates
            )
        elif USE_BLOCK_VERIFICATION:
            tokens = own[: next((n for n, draft in enumerate(own) if draft < 0), len(own))]
            h = _block_thresholds(seen, rows, tokens, cumulative_log_p_ptr, local_residual_mass_ptr)
            accepted = max((n + 1 for n in range(len(tokens)) if chances[n] <= h[n]), default=0)
        else:
            tokens, accepted = _verify_sampled(seen, rows, request, own, chances, temps[i], rates)
        sampled_ptr[i, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
        rejected_steps_ptr[i] = accepted
        if temps[i] != 0 and accepted < len(rows):
            target_rejected_logsumexp_ptr[i] = seen.target_lse(rows[accepted])
            draft_rejected_logsumexp_ptr[i] = seen.draft_lse(rows[accepted])
    return None


@jit
def _accept_greedily(sampled, accepted, best_tokens, drafts, cu_logits):
    for i in range(accepted.shape[0]):
        first, count, n = cu_logits[i], cu_logits[i + 1] - cu_logits[i] - 1, 0
        while n < count:
            sampled[i, n] = best_tokens[first + n]
            if drafts[first + n + 1] != best_tokens[first + n]:
                break
            n += 1
        accepted[i] = n


def _verify_greedily(
    drafts: list[int], best_tokens: list[int], chances: list[float], rates: torch.Tensor | None
) -> tuple[list[int], int]:
    """(tokens, number of accepted drafts). A draft is accepted if it is the best token, or at a given rate."""
    tokens = []
    for n, (draft, token) in enumerate(zip(drafts, best_tokens, strict=True)):
        held = draft >= 0 and (draft == token if rates is None else chances[n] < rates[n])
        tokens.append(draft if held else token)
        if not held:
            return tokens, n
    return tokens, len(tokens)


def _verify_sampled(
    seen: Distributions,
    rows: range,
    request: int,
    drafts: list[int],
    chances: list[float],
    temp: Any,
    rates: Any,
) -> tuple[list[int], int]:
    """As `_verify_greedily`, by Leviathan's rule: draft x is accepted with probability min(1, target(x) / draft(x))."""
    tokens: list[int] = []
    for n, draft in enumerate(drafts):
        if draft < 0:
            break
        tokens.append(draft)
        if rates is not None:
            held = chances[n] < rates[n]
        else:
            target, own = seen.log_probs(rows[n], request, n, temp, draft)
            held = target > np.log(chances[n]) + own
        if not held:
            return tokens, n
    return tokens, len(tokens)


def _block_thresholds(
    seen: Distributions, rows: range, drafts: list[int], cumulative_log_p: torch.Tensor, residual_mass: Any
) -> list[Any]:
    """Probability with which the block of drafts up to each one is accepted (Sun et al., 2024)."""
    thresholds = []
    for n in range(len(drafts)):
        ratio = cumulative_log_p[rows[n]].exp()
        if n + 1 == len(drafts):
            thresholds.append(ratio)
            continue
        if residual_mass is not None:
            mass = residual_mass[rows[n + 1], 0]
        else:
            mass = ratio * (1.0 - seen.log_probs(rows[n + 1], 0, 0, 1.0, drafts[n + 1])[0].exp())
        rest = mass + 1.0 - ratio
        thresholds.append(mass / rest if rest > 0 else torch.ones(()))
    return thresholds


def _resample_kernel(
    resampled_local_argmax_ptr, resampled_local_argmax_stride, resampled_local_max_ptr, resampled_local_max_stride,
    target_logits_ptr, target_logits_stride, target_rejected_logsumexp_ptr, draft_logits_ptr, draft_logits_stride_0,
    draft_logits_stride_1, draft_rejected_logsumexp_ptr, rejected_step_ptr, cu_num_logits_ptr,
    expanded_idx_mapping_ptr, draft_sampled_ptr, temp_ptr, seed_ptr, pos_ptr, cumulative_log_p_ptr, contexts_ptr,
    contexts_stride, watermarking_ptr, watermarking_skip_mask_ptr, watermark_key_0, watermark_key_1, vocab_size,
    BLOCK_SIZE, HAS_DRAFT_LOGITS, USE_FP64, USE_BLOCK_VERIFICATION, CONTEXT_WIDTH, WATERMARK, DEDUPLICATE_CONTEXTS,
):  # fmt: skip
    """Write the token after the accepted drafts. If a draft was rejected, it is drawn from the residual."""
    if WATERMARK:
        raise NotImplementedError("watermarks are not supported on Model Runner V2 without Triton")
    rows = cu_num_logits_ptr[:-1].long() + rejected_step_ptr
    bonus = rows == cu_num_logits_ptr[1:] - 1
    requests = expanded_idx_mapping_ptr[rows].tolist()
    temps = temp_ptr[expanded_idx_mapping_ptr[rows]].float()
    resampled_local_max_ptr.fill_(NEG_INF)
    resampled_local_argmax_ptr.zero_()
    greedy = (bonus & (temps == 0)).nonzero().flatten()
    if len(greedy):
        resampled_local_argmax_ptr[greedy, 0] = best(target_logits_ptr[rows[greedy], :vocab_size])[1]
        resampled_local_max_ptr[greedy, 0] = 0.0
    for i in temps.nonzero().flatten().tolist():
        row, step, request = int(rows[i]), int(rejected_step_ptr[i]), requests[i]
        logits = target_logits_ptr[row, :vocab_size].float()
        rejected = -1 if bonus[i] else int(draft_sampled_ptr[row + 1])
        if rejected >= 0 and HAS_DRAFT_LOGITS:
            target = logits - target_rejected_logsumexp_ptr[i]
            if USE_BLOCK_VERIFICATION and step > 0:
                target += cumulative_log_p_ptr[row - 1]
            draft = draft_logits_ptr[request, step, :vocab_size].float() / temps[i]
            ratio = (draft - draft_rejected_logsumexp_ptr[i] - target).exp()
            logits = torch.where(ratio < 1, target + torch.log1p(-ratio), NEG_INF)
        elif rejected >= 0:
            logits = logits.clone()
            logits[rejected] = NEG_INF
        index, value = noised_argmax(logits.numpy(), int(seed_ptr[request]), int(pos_ptr[row]), USE_FP64)
        resampled_local_argmax_ptr[i, 0], resampled_local_max_ptr[i, 0] = index, value


def _insert_resampled_kernel(
    sampled_ptr, sampled_stride, num_sampled_ptr, resampled_local_argmax_ptr, resampled_local_argmax_stride,
    resampled_local_max_ptr, resampled_local_max_stride, resample_num_blocks, cu_num_logits_ptr,
    expanded_idx_mapping_ptr, temp_ptr, PADDED_RESAMPLE_NUM_BLOCKS,
):  # fmt: skip
    """Write the resampled token after the accepted drafts and count it. Greedy requests have theirs already."""
    rows = cu_num_logits_ptr[:-1].long() + num_sampled_ptr
    resampled = (rows == cu_num_logits_ptr[1:] - 1) | (temp_ptr[expanded_idx_mapping_ptr[rows]] != 0)
    at = resampled.nonzero().flatten()
    sampled_ptr[at, num_sampled_ptr[at].long()] = resampled_local_argmax_ptr[at, 0]
    num_sampled_ptr += 1
