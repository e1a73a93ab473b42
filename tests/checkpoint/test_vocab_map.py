"""d2t as offsets, as absolute ids, missing, and wrong. Under a second."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_eagle3.checkpoint import CheckpointError, resolve_vocab_map

IDS = torch.tensor([0, 1, 2, 5, 6, 9])  # target ids of the six draft ids, of a vocabulary of 12
ARANGE = torch.arange(6)
OFFSETS = IDS - ARANGE
T2D = torch.zeros(12, dtype=torch.bool).index_fill_(0, IDS, True)


def resolve(d2t: torch.Tensor | None, t2d: torch.Tensor | None, vocab: int = 12) -> tuple[list[int], str]:
    offsets, note = resolve_vocab_map(d2t, t2d, vocab_size=vocab, draft_vocab_size=6, source="file.bin")
    assert offsets.dtype == torch.int64
    return offsets.tolist(), note


@pytest.mark.parametrize("t2d", [None, T2D, T2D.int()])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_offsets(t2d: torch.Tensor | None, dtype: torch.dtype) -> None:
    offsets, note = resolve(OFFSETS.to(dtype), t2d)
    assert offsets == [0, 0, 0, 2, 2, 4]
    assert "offsets" in note and ("agrees with t2d" in note) == (t2d is not None)


@pytest.mark.parametrize("t2d", [None, T2D])
def test_absolute_ids_become_offsets(t2d: torch.Tensor | None) -> None:
    offsets, note = resolve(IDS, t2d)  # as offsets the last one would be 5 + 9 = 14
    assert offsets == OFFSETS.tolist()
    assert "absolute ids" in note


def test_missing_map_is_rebuilt() -> None:
    offsets, note = resolve(None, T2D)
    assert offsets == OFFSETS.tolist()
    assert "rebuilt from t2d" in note


def test_map_in_another_order_than_the_ids() -> None:
    shuffled = IDS[[3, 0, 5, 1, 2, 4]]
    assert resolve(shuffled - ARANGE, T2D)[0] == (shuffled - ARANGE).tolist()
    assert resolve(shuffled, T2D)[0] == (shuffled - ARANGE).tolist()


def test_zeros_without_t2d_are_said_loudly() -> None:
    offsets, note = resolve(torch.zeros(6, dtype=torch.int64), None)
    assert offsets == [0] * 6 and "ALL ZEROS" in note


@pytest.mark.parametrize(
    ("d2t", "t2d", "parts"),
    [
        (None, None, ["found neither"]),
        (OFFSETS[:5], None, ["expected [6] integers", "[5]"]),
        (OFFSETS.float(), None, ["expected [6] integers", "float32"]),
        (OFFSETS, T2D[:11], ["t2d: expected [12]", "[11]"]),
        (OFFSETS, torch.zeros(12, dtype=torch.bool), ["t2d: expected 6 marked ids", "found 0"]),
        (
            torch.tensor([0, 0, 0, 2, 2, 7]),
            None,
            ["leaves the target vocabulary: ids from 0 to 12, vocab_size 12"],
        ),
        (torch.tensor([-1, 0, 0, 2, 2, 4]), None, ["ids from -1 to 9"]),
        (torch.tensor([1, 0, 0, 2, 2, 4]), None, ["1 target ids occur twice"]),
        (torch.tensor([0, 0, 0, 2, 2, 5]), T2D, ["1 of 6 target ids contradict t2d"]),
        (torch.zeros(6, dtype=torch.int64), T2D, ["contradict t2d"]),
    ],
)
def test_wrong_maps(d2t: torch.Tensor | None, t2d: torch.Tensor | None, parts: list[str]) -> None:
    with pytest.raises(CheckpointError, match="file.bin") as error:
        resolve(d2t, t2d)
    for part in parts:
        assert part in str(error.value)


def test_a_map_that_fits_both_readings_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no t2d to tell which"):
        resolve(torch.tensor([0, 2, 3, 4, 5, 6]), None)
    t2d = torch.zeros(12, dtype=torch.bool).index_fill_(0, torch.tensor([0, 2, 3, 4, 5, 6]), True)
    assert resolve(torch.tensor([0, 2, 3, 4, 5, 6]), t2d)[0] == [0, 1, 1, 1, 1, 1]


@given(st.sets(st.integers(0, 63), min_size=2, max_size=40))
def test_any_vocabulary_survives_every_way_to_store_it(chosen: set[int]) -> None:
    ids = torch.tensor(sorted(chosen))
    offsets = ids - torch.arange(len(ids))
    t2d = torch.zeros(64, dtype=torch.bool).index_fill_(0, ids, True)
    for d2t in (offsets, ids, None):
        got, _ = resolve_vocab_map(d2t, t2d, vocab_size=64, draft_vocab_size=len(ids), source="")
        assert torch.equal(got, offsets)
