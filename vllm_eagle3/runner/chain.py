"""Makes a chain of drafts on a CPU, for both runners: one draft step after another for the rows that draft."""

from collections.abc import Callable
from typing import NamedTuple

import torch

MIN_CHAIN_PROBABILITY = 0.2
"""If chains may stop early, a request stops drafting when the product of its draft probabilities falls below this.
See docs/policy.md."""

NextStep = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(index of the step, its input ids [n], the last step's output for the next one [n, h]) -> result of `model.step`."""

Sample = Callable[[int, torch.Tensor], torch.Tensor]
"""(index of the step, norm(a) [n, h]) -> ids [n]"""
Confident = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""The same -> ids and their probabilities in the draft [n]"""


class Chain(NamedTuple):
    """Drafts of n requests."""

    ids: list[torch.Tensor]  # drafts of each step, [n]
    lengths: torch.Tensor  # int64 [n], how many drafts each request keeps
    probabilities: list[torch.Tensor]  # of the chains up to and with each step's draft [n], as far as known


def draft_chain(
    first: tuple[torch.Tensor, torch.Tensor],
    most: int,
    next_step: NextStep,
    sample: Sample,
    confident: Confident | None,
) -> Chain:
    """Make up to `most` drafts for each request.

    Args:
        first: the result of `model.step` for the rows that draft: (norm(a), state for the next step).
        most: the most drafts of a request, at least 1.
        next_step: runs one more step.
        sample: drafts of a step. Used if no chain may stop, and for the last step.
        confident: drafts of the other steps. A chain ends with the draft that takes its probability below
            MIN_CHAIN_PROBABILITY. None: no chain may stop early.
    """
    hidden_states, state = first
    ids: list[torch.Tensor] = []
    probabilities: list[torch.Tensor] = []
    chain_probability = torch.ones(len(hidden_states))
    lengths = torch.zeros(len(hidden_states), dtype=torch.int64)
    for index in range(most):
        continuing = chain_probability >= MIN_CHAIN_PROBABILITY
        if not continuing.any():
            break
        lengths += continuing
        if index > 0:
            hidden_states, state = next_step(index, ids[-1], state)
        if confident is not None and index + 1 < most:
            step_ids, probability = confident(index, hidden_states)
            chain_probability = chain_probability * probability
            probabilities.append(chain_probability)
        else:
            step_ids = sample(index, hidden_states)
        ids.append(step_ids)
    return Chain(ids, lengths, probabilities)
