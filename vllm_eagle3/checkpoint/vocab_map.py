"""The map from draft to target ids, `target_id = i + d2t[i]`.

It is recognised where a checkpoint stores absolute ids instead, and rebuilt from t2d where d2t is missing."""

import torch
from torch import Tensor

from vllm_eagle3.checkpoint.errors import CheckpointError


def resolve_vocab_map(
    d2t: Tensor | None, t2d: Tensor | None, *, vocab_size: int, draft_vocab_size: int, source: str
) -> tuple[Tensor, str]:
    """Offsets and a note that says how they were found.

    Args:
        d2t: `[draft_vocab_size]` integers, offsets or absolute target ids, or None.
        t2d: `[vocab_size]` booleans (True: the target id is in the draft vocabulary), or None.
        vocab_size: ids of the target.
        draft_vocab_size: ids of the draft.
        source: the name used in error messages.

    Returns:
        `[draft_vocab_size]` int64 offsets; the note.

    Raises:
        CheckpointError: there is no map; it has a wrong shape, names ids outside the target's vocabulary or an id
            twice, or contradicts t2d; or it could be read both as offsets and as absolute ids.
    """
    arange = torch.arange(draft_vocab_size)
    selected = None if t2d is None else _selected_ids(t2d, vocab_size, draft_vocab_size, source)
    if d2t is None:
        if selected is None:
            raise CheckpointError(
                f"{source}: draft_vocab_size {draft_vocab_size} is below vocab_size {vocab_size}, so d2t "
                "or t2d is needed to map draft ids to target ids; found neither"
            )
        return selected - arange, "d2t: missing, rebuilt from t2d"
    if d2t.shape != (draft_vocab_size,) or d2t.is_floating_point() or d2t.dtype == torch.bool:
        raise CheckpointError(
            f"{source}: d2t: expected [{draft_vocab_size}] integers, found {list(d2t.shape)} {d2t.dtype}"
        )
    d2t = d2t.to(device="cpu", dtype=torch.int64)
    readings = {"offsets": arange + d2t, "absolute ids": d2t}
    problems = {name: _problem(ids, vocab_size, selected) for name, ids in readings.items()}
    fitting = [name for name, problem in problems.items() if problem is None]
    if len(fitting) == 1:
        note = f"d2t: {fitting[0]}" + ("" if selected is None else ", agrees with t2d")
        if fitting[0] == "offsets" and selected is None and not d2t.any():
            note += "; ALL ZEROS, no t2d to check: read as the first ids of the target's vocabulary"
        return readings[fitting[0]] - arange, note
    if fitting:
        raise CheckpointError(
            f"{source}: d2t may be read as offsets (target id = i + d2t[i]) and as absolute target ids, and "
            "there is no t2d to tell which; store offsets together with t2d"
        )
    reasons = "; ".join(f"read as {name}, {problem}" for name, problem in problems.items())
    raise CheckpointError(f"{source}: d2t: expected offsets (target id = i + d2t[i]), but {reasons}")


def _selected_ids(t2d: Tensor, vocab_size: int, draft_vocab_size: int, source: str) -> Tensor:
    """The target ids that t2d marks, ascending, [draft_vocab_size]."""
    if t2d.shape != (vocab_size,):
        raise CheckpointError(f"{source}: t2d: expected [{vocab_size}] (vocab_size), found {list(t2d.shape)}")
    selected = t2d.to(device="cpu").bool().nonzero().flatten()
    if len(selected) != draft_vocab_size:
        raise CheckpointError(
            f"{source}: t2d: expected {draft_vocab_size} marked ids (draft_vocab_size), found {len(selected)}"
        )
    return selected


def _problem(ids: Tensor, vocab_size: int, selected: Tensor | None) -> str | None:
    """The reason why `ids` cannot be the target ids of the draft's vocabulary, or None."""
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        return f"it leaves the target vocabulary: ids from {low} to {high}, vocab_size {vocab_size}"
    distinct = ids.unique()
    if len(distinct) != len(ids):
        return f"{len(ids) - len(distinct)} target ids occur twice"
    if selected is not None and not torch.equal(distinct, selected):
        return f"{int((distinct != selected).sum())} of {len(ids)} target ids contradict t2d"
    return None
