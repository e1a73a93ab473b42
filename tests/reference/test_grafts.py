"""Grafts of the reference decoder: the look-up and the merge by hand, the target's text, fewer verifications (5 s)."""

from pathlib import Path
from typing import Any

import pytest
import torch
from closed_form import greedy_text
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from vllm_eagle3.reference.decode import Proposer, Tree, chain, decode, eagle2_tree, grafted, look_up
from vllm_eagle3.reference.draft import load_draft
from vllm_eagle3.tree.graft import graft
from vllm_eagle3.tree.lookup import look_up as batched_look_up

TEXTS = st.lists(st.integers(0, 2), max_size=40) | st.lists(st.integers(0, 30), max_size=40).map(
    lambda t: t * 2
)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS, length=st.integers(1, 12), min_match=st.integers(1, 4), more=st.integers(0, 8))
def test_the_look_up_is_the_batched_one(text: list[int], length: int, min_match: int, more: int) -> None:
    tokens, ends = torch.tensor([[*text, 0]]), torch.tensor([len(text)])
    found = batched_look_up(tokens, ends, length, min_match, min_match + more).tokens[0]
    assert look_up(text, length, min_match, min_match + more) == found[found >= 0].tolist()


def fixed(tokens: list[int], parents: list[int]) -> Proposer:
    return lambda draft, a, kv, text: Tree([text[-1], *tokens], [-1, *parents])


def test_a_graft_by_hand() -> None:
    """The continuation of "1 2" is 3 4 1 2 3. The draft also has its 3 and 4, and in addition 9 and another 4."""
    nothing: Any = None
    propose = fixed([3, 9, 4, 4], [0, 0, 1, 2])
    tree = grafted(propose, 5)(nothing, nothing, nothing, [1, 2, 3, 4, 1, 2])
    assert tree == Tree([2, 3, 4, 1, 2, 3, 9, 4], [-1, 0, 1, 2, 3, 4, 0, 6])
    tree = grafted(propose, 5, places=6)(nothing, nothing, nothing, [1, 2, 3, 4, 1, 2])
    assert tree == Tree([2, 3, 4, 1, 2, 3, 9], [-1, 0, 1, 2, 3, 4, 0])
    tree = grafted(fixed([3], [0]))(nothing, nothing, nothing, [1, 2, 3, 4, 1])  # one token is no match
    assert tree == Tree([1, 3], [-1, 0])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 99)), max_size=12),
    TEXTS.filter(bool),
    st.integers(1, 20),
)
def test_the_merge_is_the_batched_one(nodes: list[tuple[int, int]], text: list[int], places: int) -> None:
    taken = list[tuple[int, int]]()
    for token, place in nodes:
        if (token, place % (len(taken) + 1)) not in taken:  # siblings differ
            taken.append((token, place % (len(taken) + 1)))
    tokens, parents = [token for token, _ in taken], [parent for _, parent in taken]
    nothing: Any = None
    tree = grafted(fixed(tokens, parents), 6, places=places)(nothing, nothing, nothing, text)
    continuation = torch.tensor([look_up(text, 6, 2, 8) or [-1] * 6])
    grown = (torch.tensor([column]).long() for column in (tokens, parents))
    found_tokens, found_parents, *_ = graft(*grown, continuation, places)
    used = len(tree.tokens) - 1
    assert (found_parents >= 0).sum() == used
    assert found_tokens[0, :used].tolist() == tree.tokens[1:]
    assert found_parents[0, :used].tolist() == tree.parents[1:]


@pytest.mark.parametrize("propose", [chain(4), eagle2_tree(3, 2, 6)])
def test_a_prompt_that_holds_the_answer(
    closed_form_target: Path, closed_form_draft: Path, propose: Proposer
) -> None:
    """The target's text is known, and the draft is wrong on multiples of 5: grafts reach beyond its mistakes."""
    model: Any = AutoModelForCausalLM.from_pretrained(closed_form_target, dtype=torch.float32)
    embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    draft = load_draft(closed_form_draft, target=closed_form_target, embeddings=embeddings, head=head)
    text = greedy_text(11, 70)
    prompt = [11, *text, 2, 11, *text[:2]]
    plain, with_graft = (decode(model, draft, prompt, p, 41) for p in (propose, grafted(propose, 8)))
    assert with_graft.tokens == plain.tokens == text[2:43]
    assert with_graft.accepted == [8] * 5  # the first token comes without a draft, then 9 a verification
    assert len(plain.accepted) > 8
    assert all(drafted <= plain.drafted[0] + 8 for drafted in with_graft.drafted)
    assert all(drafted >= accepted for drafted, accepted in zip(plain.drafted, plain.accepted, strict=True))
