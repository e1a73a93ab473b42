"""Rows, split, vocabulary, batches and the feature store (4 s)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from vllm_eagle3.training.data import (
    Document,
    draft_vocabulary,
    load_documents,
    make_batch,
    parse_row,
    plan_batches,
    split,
    token_counts,
    vocabulary_by_coverage,
)
from vllm_eagle3.training.features import Target
from vllm_eagle3.training.store import FeatureStore

VOCAB = 96


def write(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return path


def test_both_row_forms() -> None:
    one = parse_row({"prompt_token_ids": [5, 6], "response_token_ids": [7, 8]}, "x")
    many = parse_row({"token_ids": [5, 7, 8, 9, 7], "loss_mask": [0, 1, 1, 0, 1]}, "x")
    assert one.tokens.tolist() == [5, 6, 7, 8] and one.mask.tolist() == [False, False, True, True]
    assert many.mask.tolist() == [False, True, True, False, True]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "hello"}], ":1: expected prompt_token_ids and response_token_ids, .* found text"),
        ([{"token_ids": [1, 2], "loss_mask": [1]}], "token_ids has 2 entries but loss_mask has 1"),
        (["{not json"], ":1: not valid JSON"),
        (["[1, 2]"], ":1: expected a JSON object, found list"),
        ([{"prompt_token_ids": [1], "response_token_ids": [96, 3]}], "vocabulary has 96 entries"),
        ([{"prompt_token_ids": [1], "response_token_ids": [2]}], "no row with two or more answer tokens"),
        ([""], "no row with two or more answer tokens"),
    ],
)
def test_bad_rows_name_the_file(tmp_path: Path, rows: list[object], message: str) -> None:
    path = write(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(ValueError, match=message) as caught:
        load_documents([path], VOCAB)
    assert "bad.jsonl" in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such data file"):
        load_documents([tmp_path / "none.jsonl"], VOCAB)


def test_long_reasoning_is_not_cut(tmp_path: Path) -> None:
    """8k tokens of thinking stay one document and make a batch of their own."""
    row = {"prompt_token_ids": [1, 2], "response_token_ids": [i % 90 for i in range(8192)]}
    short = {"prompt_token_ids": [1, 2], "response_token_ids": [3] * 10}
    documents = load_documents([write(tmp_path / "long.jsonl", row, short, short)], VOCAB)
    lengths = [len(d.tokens) for d in documents]
    assert max(lengths) == 8194
    plan = plan_batches(lengths, 1024, seed=0, epoch=0)
    assert sorted(map(sorted, plan)) == [[0], [1, 2]]


def test_split_keeps_a_prompt_on_its_side() -> None:
    def doc(name: str) -> Document:
        return Document(name, "s", 0.0, np.zeros(3, np.int32), np.ones(3, bool))

    few, more = [doc(f"a{i}") for i in range(400)], [doc(f"b{i}") for i in range(400)]
    train, held = split(few, 0.1)
    assert 20 < len(held) < 60 and len(train) + len(held) == 400
    assert {d.id for d in held} <= {d.id for d in split(few + more + few, 0.1)[1]}
    assert not {d.id for d in held} & {d.id for d in split(few + more, 0.1)[0]}


def test_vocabulary_counts_answers_only() -> None:
    row = {"prompt_token_ids": [9, 9, 9, 9], "response_token_ids": [5, 7, 7, 3]}
    counts = token_counts([parse_row(row, "x")], VOCAB)
    assert counts[9] == 0 and counts[7] == 2
    assert draft_vocabulary(counts, 3).tolist() == [3, 5, 7]
    with pytest.raises(ValueError, match=r"expected a size in 1\.\.96, found 97"):
        draft_vocabulary(counts, 97)


def test_few_prompts_still_leave_some_to_validate_on() -> None:
    """60 conversations at 2.5 % used to hold out none; now the eight with the lowest hashes, all turns together."""
    documents = [
        Document(f"p{i}", "s", 0.0, np.full(3, turn, np.int32), np.ones(3, bool))
        for i in range(60)
        for turn in range(2)
    ]
    train, held = split(documents, 0.025)
    assert len({d.id for d in held}) == 8 and len(held) == 16 and len(train) == 104
    assert len(split(documents[:20], 0.025)[1]) == 4, "a fifth of ten prompts"
    assert split(documents, 0.0)[1] == []


def test_vocabulary_covers_the_greedy_held_out_answers() -> None:
    """1000 tokens, the more frequent the lower: the size follows from held-out text, not from the training text."""
    rng = np.random.default_rng(0)
    counts = (1e6 / np.arange(1, 40001) ** 1.5).astype(np.int64)

    def held(ids: np.ndarray, temperature: float) -> Document:
        return Document("h", "s", temperature, ids.astype(np.int32), np.ones(len(ids), bool))

    text = np.concatenate([rng.integers(0, 700, 980), np.full(20, 39999)])
    size = vocabulary_by_coverage(counts, [held(text, 0.0), held(np.full(500, 30000), 1.0)])
    assert size == 768 and (text < size).mean() >= 0.98
    assert vocabulary_by_coverage(counts, [held(np.full(9, 39999), 0.0)]) == 32768
    flat = np.ones(500, dtype=np.int64)
    assert vocabulary_by_coverage(flat, []) == 500, "no more than the target has"


def test_weights_are_uses_an_epoch() -> None:
    lengths, weights = [10] * 300, [0.0] * 100 + [0.5] * 100 + [2.0] * 100
    used = [
        [i for group in plan_batches(lengths, 64, 0, epoch, weights) for i in group] for epoch in range(20)
    ]
    assert not any(i < 100 for epoch in used for i in epoch)
    assert all(epoch.count(i) == 2 for epoch in used for i in range(200, 300))
    halves = sum(100 <= i < 200 for epoch in used for i in epoch)
    assert 850 < halves < 1150, "2000 chances of a half"
    assert used[0] != used[1]
    with pytest.raises(ValueError, match="leave no document"):
        plan_batches(lengths, 64, 0, 0, [0.0] * 300)


def test_batches_hold_every_document_once() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 200, 500).tolist()
    plans = [plan_batches(lengths, 512, seed=1, epoch=e) for e in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]
    for plan in plans:
        assert sorted(i for group in plan for i in group) == list(range(500))
        assert max(len(g) * max(lengths[i] for i in g) for g in plan) <= 512
        padded = sum(len(g) * max(lengths[i] for i in g) for g in plan)
        assert padded < 1.15 * sum(lengths)


def test_default_layers_need_seven(tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="at least 7 layers, found 4"):
        Target(tmp_path)


def test_layers_the_target_has_not(tiny_target: Path) -> None:
    with pytest.raises(ValueError, match=r"expected ids in 0\.\.7"):
        Target(tiny_target, (2, 3, 8))


def test_features_are_hf_hidden_states(tiny_target: Path, tiny_rows: Path) -> None:
    """Id k is the state after k layers, before the last norm; padding changes nothing."""
    target = Target(tiny_target, (0, 3, 6), dtype=torch.float32)
    documents = load_documents([tiny_rows], VOCAB)[:3]
    features = target.features(make_batch(documents))
    start = 0
    for doc in documents:
        ids = torch.from_numpy(doc.tokens.astype(np.int64))[None]
        with torch.no_grad():
            states = target.model(ids, output_hidden_states=True).hidden_states
        part = slice(start, start := start + len(doc.tokens))
        for got, k in zip(features.aux, (0, 3, 6), strict=True):
            torch.testing.assert_close(got[part], states[k][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(features.last[part], states[-1][0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stored_features_equal_online_ones(
    tiny_target: Path, tiny_rows: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    target = Target(tiny_target, dtype=dtype)
    documents = load_documents([tiny_rows], VOCAB)
    store = FeatureStore(tmp_path / "f", target, documents, shard_tokens=300)
    plan = plan_batches([len(d.tokens) for d in documents], 200, 0, 0)
    online = [target.features(make_batch([documents[i] for i in g])) for g in plan]
    for group in plan:
        store.features(make_batch([documents[i] for i in group]), group)
    again = FeatureStore(tmp_path / "f", target, documents, shard_tokens=300)
    target.decoder = None  # what follows can only come from the disk
    for group, want in zip(plan, online, strict=True):
        got = again.features(make_batch([documents[i] for i in group]), group)
        for a, b in zip([*got.aux, got.last], [*want.aux, want.last], strict=True):
            assert torch.equal(a, b)


def test_store_is_plain_safetensors(tiny_target: Path, tiny_rows: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    target = Target(tiny_target)
    documents = load_documents([tiny_rows], VOCAB)[:4]
    store = FeatureStore(tmp_path, target, documents)
    features = store.features(make_batch(documents), range(4))
    with safe_open(tmp_path / "features-00000.safetensors", "pt") as shard:
        assert torch.equal(shard.get_tensor("features"), torch.cat([*features.aux, features.last], dim=1))


def test_store_of_other_data(tiny_target: Path, tiny_rows: Path, tmp_path: Path) -> None:
    target = Target(tiny_target)
    documents = load_documents([tiny_rows], VOCAB)
    FeatureStore(tmp_path, target, documents[:10])
    with pytest.raises(ValueError, match="made for other data or settings .*documents: 10 instead of 11"):
        FeatureStore(tmp_path, target, documents[:11])


def test_store_without_room(
    tiny_target: Path, tiny_rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match="features need .* tokens x 4 states x 32 .* 0.00 GB free"):
        FeatureStore(tmp_path / "s", Target(tiny_target), load_documents([tiny_rows], VOCAB))
    assert not list((tmp_path / "s").iterdir())
