"""The reference decoder writes the target's text, whatever is drafted; its trees equal brute force (20 s)."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from closed_form import expected_accepted, greedy_text
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from vllm_eagle3.config import cache_folder
from vllm_eagle3.evaluation import demo_models
from vllm_eagle3.reference.config import PlainDraftConfig
from vllm_eagle3.reference.decode import Proposer, Tree, chain, decode, eagle2_tree
from vllm_eagle3.reference.draft import DraftModel, load_draft

VOCAB = 61
PROMPT = [5, 6, 7, 8, 9]


@pytest.fixture(scope="module")
def target() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=7, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def plain_draft(**options: bool) -> DraftModel:
    torch.manual_seed(1)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "head_dim": 8,
        "target_hidden_size": 32,
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB}
    model = DraftModel(
        PlainDraftConfig(**sizes, **heads, draft_vocab_size=40, aux_layers=(2, 4, 7), **options)
    )
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.normal_(0.0, 0.3)  # large enough for attention and positions to matter
    model.d2t.copy_(torch.arange(40) // 2)  # increasing target ids, some left out
    return model.eval()


@pytest.fixture(scope="module", params=["plain", "norms"])
def draft(request: pytest.FixtureRequest) -> DraftModel:
    return plain_draft() if request.param == "plain" else plain_draft(fc_norm=True, norm_output=True)


def ends(target: Any) -> dict[str, Tensor]:
    """The target's embeddings and head, for drafts without their own."""
    return {
        "embeddings": target.get_input_embeddings().weight,
        "head": target.get_output_embeddings().weight,
    }


def greedy(target: Any, prompt: list[int], length: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = target.generate(ids, max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, len(prompt) :].tolist()


def planted(text: list[int], rng: random.Random) -> Proposer:
    """Random trees that contain the true continuation of `text` on a random path, up to a random depth."""

    def propose(draft: DraftModel, a: Any, kv: Any, so_far: list[int]) -> Tree:
        at = len(so_far) - 1  # place of the root in the text
        assert text[: at + 1] == so_far
        tokens, parents, tip = [text[at]], [-1], 0
        for depth in range(rng.randrange(6)):
            for parent in [rng.randrange(len(tokens)) for _ in range(rng.randrange(3))]:
                tokens.append((text[at + depth + 1] + 1 + rng.randrange(VOCAB - 2)) % VOCAB)
                parents.append(parent)
            tokens.append(text[at + depth + 1])
            parents.append(tip)
            tip = len(tokens) - 1
        return Tree(tokens, parents)

    return propose


@pytest.mark.parametrize("propose", [chain(3), eagle2_tree(4, 5, 20), eagle2_tree(1, 3, 2)])
def test_greedy_text_is_the_targets(target: Any, draft: DraftModel, propose: Proposer) -> None:
    got = decode(target, draft, PROMPT, propose, 40)
    assert got.tokens == greedy(target, PROMPT, 40)
    assert len(got.accepted) + sum(got.accepted) >= 39


def test_accepted_paths_leave_the_right_cache(target: Any, draft: DraftModel) -> None:
    """The right path of these trees lies between wrong nodes, so a wrong slot, position or mask changes the text."""
    text = [*PROMPT, *greedy(target, PROMPT, 80)]
    got = decode(target, draft, PROMPT, planted(text, random.Random(0)), 60)
    assert got.tokens == text[len(PROMPT) :][:60]
    assert sum(got.accepted) > len(got.accepted)  # the trees did help


@torch.inference_mode()
def test_draft_reads_the_accepted_path(target: Any, draft: DraftModel) -> None:
    """The draft starts from the same state as after one pass of target and draft over the whole text."""
    text = [*PROMPT, *greedy(target, PROMPT, 60)]
    planting = planted(text, random.Random(3))
    starts = []

    def propose(draft: DraftModel, a: Any, kv: Any, so_far: list[int]) -> Tree:
        starts.append((a, kv, len(so_far) - 2))
        return planting(draft, a, kv, so_far)

    decode(target, draft, PROMPT, propose, 40)
    seen: dict[int, torch.Tensor] = {}
    for k in draft.config.aux_layers:  # the state after k layers, before any norm
        layer = target.model.layers[k - 1]
        layer.register_forward_hook(lambda module, args, output, k=k: seen.update({k: output[0]}))
    for a, kv, position in starts:
        ids = torch.tensor(text[: position + 2])
        target(ids[None, :-1])
        g = draft.fuse([seen[k] for k in draft.config.aux_layers])
        a_once, kv_once = draft.layer(draft.embed(ids[1:]), g, torch.arange(position + 1))
        torch.testing.assert_close(a, a_once[-1:], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(kv, kv_once, rtol=1e-3, atol=1e-3)


def test_stops_at_the_stop_token(target: Any, draft: DraftModel) -> None:
    text = greedy(target, PROMPT, 30)
    stop = text[12]
    whole = [*PROMPT, *text, *greedy(target, [*PROMPT, *text], 40)]
    got = decode(target, draft, PROMPT, planted(whole, random.Random(1)), 30, stop={stop})
    assert got.tokens == text[: text.index(stop) + 1]


@pytest.mark.parametrize("seed", range(4))
def test_eagle2_tree_against_brute_force(draft: DraftModel, seed: int) -> None:
    """The values are computed again along each path without a mask; expansion, reranking and chain are literal."""
    torch.manual_seed(seed)
    depth, topk, nodes, past = 4, 3, 12, 1
    g, tokens = torch.randn(past, 32), torch.randint(0, VOCAB, (past,))
    text = [*tokens.tolist(), 33]
    with torch.inference_mode():
        a, kv = draft.layer(draft.embed(tokens), g, torch.arange(past))
        tree = eagle2_tree(depth, topk, nodes)(draft, a[-1:], kv, text)
        line = chain(depth)(draft, a[-1:], kv, text)

        def children(path: tuple[int, ...]) -> list[tuple[float, int]]:
            state, cache = a[-1:], kv
            for i, token in enumerate(path):
                e, at = draft.embed(torch.tensor([token])), torch.tensor([past + i])
                state, cache = draft.layer(e, draft.next_g(state), at, cache)
            logp = draft.logits(state)[0].log_softmax(-1)
            top = logp.topk(topk)
            return list(zip(top.values.tolist(), draft.draft_to_target(top.indices).tolist(), strict=True))

        level: dict[tuple[int, ...], float] = {(): 0.0}
        found: dict[tuple[int, ...], float] = {}
        for _ in range(depth):
            new = {(*p, t): v + logp for p, v in level.items() for logp, t in children(p)}
            found |= new
            level = dict(sorted(new.items(), key=lambda item: -item[1])[:topk])
        best: tuple[int, ...] = ()
        for _ in range(depth):
            best = (*best, children(best)[0][1])
    assert (line.tokens, line.parents) == ([33, *best], [-1, 0, 1, 2, 3])
    wanted = set(sorted(found, key=lambda path: -found[path])[:nodes])

    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*paths[parent], token) if parent >= 0 else ())
    assert tree.tokens[0] == 33
    assert set(paths[1:]) == wanted and len(paths) == nodes + 1


@torch.inference_mode()
def test_sampled_text_follows_the_target(target: Any) -> None:
    """Chi-squared of the second token at temperature 0.7, the first one that a draft can spoil.

    The draft is a tree of depth 1 with half of the vocabulary, so that some drafts are accepted and others refused.
    """
    logits = target(torch.tensor([PROMPT])).logits[0, -1]
    after = target(torch.tensor([[*PROMPT, t] for t in range(VOCAB)])).logits[:, -1]
    exact = (logits / 0.7).softmax(-1) @ (after / 0.7).softmax(-1)

    def half(draft: DraftModel, a: Any, kv: Any, text: list[int]) -> Tree:
        return Tree([text[-1], *range(0, VOCAB, 2)], [-1, *[0] * len(range(0, VOCAB, 2))])

    generator, model = torch.Generator().manual_seed(20260101), plain_draft()
    n, counts, accepted = 400, torch.zeros(VOCAB), 0
    for _ in range(n):
        got = decode(target, model, PROMPT, half, 2, (), 0.7, generator)
        counts[got.tokens[1]] += 1
        accepted += got.accepted[0]
    big = exact * n >= 5
    observed = torch.cat([counts[big], counts[~big].sum()[None]])
    expected = torch.cat([exact[big], exact[~big].sum()[None]]) * n
    statistic = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    assert freedom >= 5 and n / 4 < accepted < n
    assert statistic < freedom + 4 * (2 * freedom) ** 0.5  # 4 sigma


def test_closed_form_acceptance(closed_form_target: Path, closed_form_draft: Path) -> None:
    """The draft is wrong on multiples of 5, so the number of accepted drafts of each verification is known."""
    model: Any = AutoModelForCausalLM.from_pretrained(closed_form_target, dtype=torch.float32)
    draft = load_draft(closed_form_draft, target=closed_form_target, **ends(model))
    got = decode(model, draft, [3, 4, 11], chain(4), 50)
    text = greedy_text(11, 60)
    assert got.tokens == text[:50]
    place = 0
    for accepted in got.accepted:
        assert accepted == expected_accepted(text[place], 4, 5)
        place += accepted + 1


def test_real_draft(tmp_path: Path) -> None:
    """With the default models in float32, chain and tree give the target's greedy text, and drafts are accepted."""
    folder = cache_folder() / demo_models.TARGET_NAME
    if not (folder / "config.json").is_file():
        pytest.skip("the embedded target is not in the cache yet (`make demo` puts it there)")
    try:
        head = demo_models.default_draft()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    draft = load_draft(head, target=folder, **ends(model))
    ids = tokenizer.encode("The capital of France is")
    text = greedy(model, ids, 32)
    for propose in (chain(3), eagle2_tree(3, 4, 10)):
        got = decode(model, draft, ids, propose, 32)
        assert got.tokens == text
        assert sum(got.accepted) > 0


@pytest.mark.parametrize(("prompt", "length"), [([], 5), ([1], 0)])
def test_bad_input(target: Any, draft: DraftModel, prompt: list[int], length: int) -> None:
    with pytest.raises(ValueError, match="expected a prompt"):
        decode(target, draft, prompt, chain(2), length)
