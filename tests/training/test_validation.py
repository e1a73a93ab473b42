"""Validation predicts decoding: the walk through a greedy answer is what the reference decoder does (10 s)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_eagle3.reference.decode import chain, decode
from vllm_eagle3.training.data import Document, make_batch
from vllm_eagle3.training.features import Target
from vllm_eagle3.training.initialize import new_draft
from vllm_eagle3.training.validation import ValidationSet, choose, walk

STEPS = 3


def document(name: str, temperature: float = 0.0, source: str = "s") -> Document:
    return Document(name, source, temperature, np.arange(3, 9, dtype=np.int32), np.ones(6, dtype=bool))


def test_walk() -> None:
    """Two answers, rows 4..9 and 20..22; steps 2. Accepted drafts at each row: 1 2 0 0 2 1 | 0 2 0."""
    rows = torch.tensor([4, 5, 6, 7, 8, 9, 20, 21, 22])
    accepted = [1, 2, 0, 0, 2, 1, 0, 2, 0]
    right = torch.tensor([[n > j for n in accepted] for j in range(2)])
    valid = torch.ones_like(right)
    valid[1, [5, 8]] = False
    # 4 -> 6 -> 7 -> 8 -> behind the end; 20 -> 21 -> behind the end
    assert rows[walk(rows, right, valid)].tolist() == [4, 6, 7, 8, 20, 21]
    # A chain whose answer ends before it fails is not counted: that of row 9, one draft accepted, one unknown.
    assert walk(rows[5:6], right[:, 5:6], valid[:, 5:6]).tolist() == []


def test_validation_is_what_decoding_gives(tiny_target: Path) -> None:
    target = Target(tiny_target, dtype=torch.float32)
    rng, documents, texts = np.random.default_rng(0), [], []
    for i in range(6):
        prompt = rng.integers(3, 96, 7).tolist()
        ids = torch.tensor([prompt])
        out = target.model.generate(
            ids, max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        mask = np.arange(67) >= 7
        documents.append(Document(str(i), "s", 0.0, out[0].numpy().astype(np.int32), mask))
        texts.append((prompt, out[0, 7:].tolist()))
    model = new_draft(target, torch.arange(96), {}, "target", 0, make_batch(documents))
    measured = ValidationSet(target, {"all": documents}, 256).measure(model, STEPS)
    accepted = []
    for prompt, text in texts:
        answer = decode(target.model, model.eval(), prompt, chain(STEPS), 60)
        assert answer.tokens == text
        # The last chains reach behind the text; validation leaves them out.
        used, place = [], 1
        for n in answer.accepted:
            if place + min(n + 1, STEPS) <= len(text):
                used.append(n)
            place += n + 1
        accepted += used
    assert 1.05 < measured.tau < STEPS + 1, "a draft that is sometimes right"
    assert measured.tau == pytest.approx(1 + np.mean(accepted), abs=0.02)


def test_groups_are_of_one_size_and_tau_is_their_mean(tiny_target: Path) -> None:
    found = choose(
        [document(f"{s}{i}", i % 2, s) for s in "abc" for i in range(10)], {"x": ("a",), "y": ("b",)}, 6
    )
    assert {name: [d.id for d in group] for name, group in found.items()} == {
        "x": ["a0", "a2", "a4"],
        "y": ["b0", "b2", "b4"],
    }
    target = Target(tiny_target, dtype=torch.float32)
    model = new_draft(target, torch.arange(96), {}, "target", 0, make_batch([document("x")]))
    measured = ValidationSet(target, found, 64).measure(model, 2)
    assert set(measured.groups) == {"x", "y"}
    assert measured.tau == pytest.approx(sum(measured.groups.values()) / 2)


def test_sampled_answers_alone_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert len(choose([document("a", 1.0)], {}, 4)["all"]) == 1
    assert "no held-out answer is greedy" in caplog.text
    assert choose([], {}, 4) == {}
