"""Look-up: the tokens that followed an earlier occurrence of a text's newest tokens.

The rule, for a text t[0 .. n-1]: find all earlier places where the tokens just before the place equal the newest
tokens of the text. Take the place with the longest match, counted up to `max_match` tokens, and the latest of equally
long matches. A match of fewer than `min_match` tokens does not count. The continuation is copied from that place on.
If the text ends before `length` tokens are copied, the copy reads its own first tokens next, so that a repetition of
three tokens goes on as a repetition.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MIN_MATCH, MAX_MATCH = 2, 8  # tokens


class Continuation(NamedTuple):
    """The result of a look-up for each text of a batch."""

    tokens: Tensor  # [batch, length] int64, -1 for texts without a match
    match: Tensor  # [batch] int64, tokens that match, 0 for none


def look_up(
    tokens: Tensor, ends: Tensor, length: int, min_match: int = MIN_MATCH, max_match: int = MAX_MATCH
) -> Continuation:
    """The continuation of each text by the module's rule.

    Args:
        tokens: int32 or int64 [batch, width], one text per row. Values at `ends` and beyond do not matter.
        ends: integer [batch], number of tokens of each text, at most width. A text without tokens has no match.
        length: tokens of a continuation.
        min_match: the fewest tokens of a match, at least 1.
        max_match: the most tokens of a match that are counted.

    On a CPU the texts are searched one by one, beginning at the occurrences of the newest token. On other devices all
    places are compared in operations of fixed shape, which the host does not wait for.
    """
    if tokens.device.type != "cpu":
        return look_up_scan(tokens, ends, length, min_match, max_match)
    found = [
        look_up_text(text[:end], length, min_match, max_match)
        for text, end in zip(tokens.numpy(), ends.tolist(), strict=True)
    ]
    continuations = np.full((len(found), length), -1, dtype=np.int64)
    for row, (continuation, match) in enumerate(found):
        if match:
            continuations[row] = continuation
    return Continuation(torch.from_numpy(continuations), torch.tensor([m for _, m in found]).long())


def look_up_text(
    text: np.ndarray, length: int, min_match: int = MIN_MATCH, max_match: int = MAX_MATCH
) -> tuple[np.ndarray, int]:
    """Look up one text, integers [n]: its continuation [length] and match, or an empty array and 0."""
    last = len(text) - 1
    places = np.flatnonzero(text[:last] == text[last]) if last > 0 else np.empty(0, dtype=np.int64)
    match = min(len(places), 1)
    while 0 < match < max_match:
        longer = places[places >= match]
        longer = longer[text[longer - match] == text[last - match]]
        if not len(longer):
            break
        places, match = longer, match + 1
    if match < min_match:
        return text[:0], 0
    place = places[-1]
    return text[place + 1 + np.arange(length) % (last - place)], match


def look_up_scan(tokens: Tensor, ends: Tensor, length: int, min_match: int, max_match: int) -> Continuation:
    """`look_up` in operations of fixed shape, which compare each place of each text with the newest tokens."""
    width = tokens.shape[1]
    place = torch.arange(width, device=tokens.device)
    last = ends.long()[:, None] - 1
    alive = place < last  # the places whose last j + 1 tokens equal the newest ones
    match = torch.zeros_like(tokens, dtype=torch.int32)
    for j in range(min(max_match, width)):
        alive = alive[:, min(j, 1) :] & (tokens[:, : width - j] == tokens.gather(1, (last - j).clamp(min=0)))
        match[:, j:] += alive
    best = torch.where(match >= min_match, match.long() * width + place, 0).amax(dim=1, keepdim=True)
    copied = (last - best % width).clamp(min=1)
    steps = torch.arange(length, device=tokens.device) % copied
    continuation = tokens.gather(1, (best % width + 1 + steps).clamp(max=width - 1)).long()
    return Continuation(continuation.masked_fill(best < width, -1), best[:, 0] // width)
