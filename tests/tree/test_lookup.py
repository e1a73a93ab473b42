"""The look-up on hand-made texts; both forms equal a literal scan (3 s)."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_eagle3.tree.lookup import look_up, look_up_scan, look_up_text


def literal(text, length, min_match, max_match):
    """Try all earlier places in turn. A later place wins if its match is as long."""
    best_match, best_place = 0, None
    for place in range(len(text) - 1):
        match = 0
        while match < max_match and match <= place and text[place - match] == text[len(text) - 1 - match]:
            match += 1
        if match >= max(best_match, min_match):
            best_match, best_place = match, place
    if best_place is None:
        return [], 0
    copy = list(text)
    for i in range(length):  # one token at a time: the copy may read what it has written
        copy.append(copy[best_place + 1 + i])
    return copy[len(text) :], best_match


def test_hand_made_texts():
    def found(text, **options):
        tokens, match = look_up_text(np.array(text), 3, **options)
        return tokens.tolist(), match

    assert found([1, 2, 3, 4, 5, 1, 2]) == ([3, 4, 5], 2)
    assert found([1, 2, 3, 9, 1, 2, 4, 8, 1, 2]) == ([4, 8, 1], 2)  # the latest of two equal matches
    assert found([7, 1, 2, 3, 9, 8, 1, 2, 4, 9, 7, 1, 2]) == (
        [3, 9, 8],
        3,
    )  # a longer match before a later one
    assert found([5, 6, 5, 6]) == ([5, 6, 5], 2)  # a loop goes on
    assert found([3, 3, 3]) == ([3, 3, 3], 2)
    assert found([1, 2, 3, 2]) == ([], 0)
    assert found([1, 2, 3, 2], min_match=1) == ([3, 2, 3], 1)
    assert found([1]) == found([]) == ([], 0)


def test_the_cap_makes_longer_matches_equal():
    text = [1, 2, 3, 4, 5, 8, 3, 4, 6, 1, 2, 3, 4]
    assert look_up_text(np.array(text), 1, max_match=4)[0].tolist() == [5]
    assert look_up_text(np.array(text), 1, max_match=2)[0].tolist() == [6]


TEXTS = st.lists(st.integers(0, 2), max_size=40) | st.lists(st.integers(0, 30), max_size=40).map(
    lambda t: t * 2
)


@settings(max_examples=500, deadline=None)
@given(
    texts=st.lists(TEXTS, min_size=1, max_size=4),
    length=st.integers(1, 12),
    min_match=st.integers(1, 4),
    more=st.integers(0, 8),
    slack=st.integers(0, 3),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
def test_both_forms_against_a_literal_scan(texts, length, min_match, more, slack, dtype):
    max_match = min_match + more
    width = max(max(map(len, texts)) + slack, 1)
    tokens = torch.randint(0, 3, (len(texts), width), dtype=dtype)  # more than the texts
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text, dtype=dtype)
    ends = torch.tensor([len(text) for text in texts])
    for form in (look_up, look_up_scan):
        found = form(tokens, ends, length, min_match, max_match)
        for row, text in enumerate(texts):
            expected, match = literal(text, length, min_match, max_match)
            assert found.match[row] == match
            assert found.tokens[row].tolist() == (expected or [-1] * length)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    tokens, ends = torch.randint(0, 9, (7, 300)), torch.randint(0, 301, (7,))
    expected = look_up(tokens, ends, 8)
    found = look_up(tokens.cuda(), ends.cuda(), 8)
    assert torch.equal(found.tokens.cpu(), expected.tokens) and torch.equal(found.match.cpu(), expected.match)
