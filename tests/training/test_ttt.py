"""The training-time test against literal masks and against the draft run step by step (8 s)."""

import pytest
import torch

from vllm_eagle3.reference.draft import DraftModel
from vllm_eagle3.training.attention import FlashAttention, FlexAttention, Layout, ttt_mask
from vllm_eagle3.training.copying import copy_loss
from vllm_eagle3.training.data import Batch
from vllm_eagle3.training.features import Features, Target
from vllm_eagle3.training.initialize import new_draft
from vllm_eagle3.training.settings import LossOptions
from vllm_eagle3.training.ttt import Chains, simulate, target_table, ttt_loss

LITERAL = """
100 000 000
110 000 000
111 000 000
100 100 000
110 010 000
111 001 000
100 100 100
110 010 010
111 001 001
"""
LITERAL_PACKED = """
1000 0000
1100 0000
0010 0000
0011 0000
1000 1000
1100 0100
0010 0010
0011 0001
"""


def literal(text: str) -> torch.Tensor:
    return torch.tensor([[c == "1" for c in line.replace(" ", "")] for line in text.split("\n") if line])


def batch(*lengths: int, seed: int = 0, prompt: int = 2) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 96, (sum(lengths),), generator=generator)
    mask = torch.cat([torch.arange(n) >= prompt for n in lengths])
    return Batch(tokens, mask, torch.tensor(lengths))


@pytest.fixture(scope="module")
def target(tiny_target) -> Target:
    return Target(tiny_target, dtype=torch.float32)


def draft(target: Target, **options: bool) -> DraftModel:
    model = new_draft(target, torch.arange(8, 72), options, "random", 3, batch(30))
    for parameter in model.parameters():  # weights of a size at which every part matters
        if parameter.dim() > 1 and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model


def test_mask_is_figure_6() -> None:
    assert torch.equal(ttt_mask(torch.zeros(3, dtype=torch.int64), 3), literal(LITERAL))


def test_mask_keeps_packed_documents_apart() -> None:
    assert torch.equal(ttt_mask(torch.tensor([0, 0, 1, 1]), 2), literal(LITERAL_PACKED))


@pytest.mark.parametrize("lengths", [(3,), (2, 2), (5, 1, 7)])
@pytest.mark.parametrize("backend", [FlashAttention, FlexAttention])
def test_attention_equals_the_literal_mask(lengths: tuple[int, ...], backend: type) -> None:
    """Outputs of every step (and gradients, in the CPU's form) against dense attention under `ttt_mask`."""
    torch.manual_seed(0)
    n, heads, d, steps = sum(lengths), 2, 8, 3
    layout = Layout.build(torch.tensor(lengths), torch.arange(n))
    grads = backend is FlashAttention
    q, k, v = (torch.randn(steps, n, heads, d, requires_grad=grads) for _ in range(3))

    scores = torch.einsum("qhd,khd->hqk", q.flatten(0, 1), k.flatten(0, 1)) * d**-0.5
    scores = scores.masked_fill(~ttt_mask(layout.document, steps), -torch.inf)
    want = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.flatten(0, 1)).view(steps, n, heads, d)

    attend = backend(layout, k[0], v[0])
    chain = [(k[1 : j + 1].transpose(0, 1), v[1 : j + 1].transpose(0, 1)) for j in range(steps)]
    got = torch.stack([attend(q[j], *chain[j]) for j in range(steps)])
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)
    if grads:
        weight = torch.randn_like(want)
        mine = torch.autograd.grad((got * weight).sum(), (q, k, v))
        theirs = torch.autograd.grad((want * weight).sum(), (q, k, v))
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=5e-6, rtol=1e-4)


def test_chains_stay_inside_answers() -> None:
    mask = torch.tensor([0, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    chains = Chains.build(Batch(torch.arange(11), mask, torch.tensor([8, 3])), 2)
    # Chains start one before the token they are given: 1 and 2 in the first answer, 5 and 8 in the others.
    assert chains.rows.tolist() == [1, 2, 5, 8]
    assert chains.valid.tolist() == [[True] * 4, [True, False, False, False]]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_before_residual": True},
        {"fc_norm": True, "norm_output": True},
        {"input_norm": True},
        {"qk_norm": True},
    ],
    ids=str,
)
def test_simulated_steps_are_the_chain_the_decoder_runs(target: Target, options: dict[str, bool]) -> None:
    """Step j in training = prefill up to p, then j - 1 cached chain steps, for every packed chain."""
    model = draft(target, **options)
    packed = batch(9, 14, 6)
    features = target.features(packed)
    chains = Chains.build(packed, 5)
    with torch.no_grad():
        states = simulate(model, packed, features, chains, 5).states
        places = {int(i): n for n, i in enumerate(chains.later)}
        start = 0
        for n in packed.lengths.tolist():
            own = slice(start, start + n)
            tokens, g = packed.tokens[own], model.fuse([s[own] for s in features.aux])
            for i, row in enumerate(chains.rows.tolist()):
                if not start <= row < start + n:
                    continue
                p = row - start
                a, kv = model.layer(model.embed(tokens[1 : p + 2]), g[: p + 1], torch.arange(p + 1))
                a = a[-1:]
                for j in range(1, 6):
                    if j > 1:
                        if not chains.valid[j - 1, i]:
                            break
                        e = model.embed(tokens[p + j : p + j + 1])
                        a, kv = model.layer(e, model.next_g(a), torch.tensor([p + j - 1]), kv)
                    at = i if j == 1 else places[i]
                    torch.testing.assert_close(states[j - 1][at : at + 1], a, atol=1e-4, rtol=1e-4)
            start += n


def test_documents_do_not_see_one_another(target: Target) -> None:
    model = draft(target)
    packed, alone = batch(9, 14), Batch(batch(9, 14).tokens[9:], batch(9, 14).mask[9:], torch.tensor([14]))
    both = simulate(model, packed, target.features(packed), Chains.build(packed, 3), 3)
    one = simulate(model, alone, target.features(alone), Chains.build(alone, 3), 3)
    for a, b in zip(both.states, one.states, strict=True):
        torch.testing.assert_close(a[-len(b) :], b, atol=1e-4, rtol=1e-4)


def test_target_distribution_is_the_one_that_predicts_the_label(target: Target) -> None:
    """Step j of the chain at p is scored against the target's softmax at p + j, over the draft vocabulary."""
    model = draft(target)
    packed = batch(12, 9)
    ids = packed.tokens[None, :12]
    logits = target.model(ids).logits[0]
    chains = Chains.build(packed, 2)
    features = target.features(packed)
    rows = chains.rows[chains.rows < 9]
    for j in (1, 2):
        table, index = target_table(features, target.head.of(model.target_ids), chains.at(j, 21))
        for i, row in enumerate(rows.tolist()):
            want = logits[row + j][model.target_ids].softmax(-1)
            torch.testing.assert_close(table[index[i]], want, atol=1e-5, rtol=1e-4)


def test_recompute_gives_the_same_gradients(target: Target) -> None:
    model, packed = draft(target), batch(9, 14)
    features, head = target.features(packed), target.head.of(model.target_ids)
    grads = []
    for recompute in (False, True):
        model.zero_grad()
        ttt_loss(model, packed, features, head, LossOptions(4, recompute=recompute))[0].backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_copy_supervision_is_added_to_the_loss(target: Target) -> None:
    model, tokens = draft(target), torch.tensor([5, 9, 11, 30, 5, 9, 11, 31, 5, 9])
    packed = Batch(tokens, torch.ones(10, dtype=torch.bool), torch.tensor([10]))
    features, head = target.features(packed), target.head.of(model.target_ids)
    run = simulate(model, packed, features, Chains.build(packed, 2), 2)
    copied = copy_loss(run.q, run.k, packed, run.layout, 2)
    plain, both = (
        ttt_loss(model, packed, features, head, LossOptions(2, copy_loss=w))[0] for w in (0.0, 0.5)
    )
    groups = model.config.num_attention_heads // model.config.num_key_value_heads
    assert groups == 2 and float(copied) > 0
    torch.testing.assert_close(both - plain, 0.5 * copied)


def test_nothing_to_learn_is_an_error(target: Target) -> None:
    packed = Batch(torch.arange(4), torch.tensor([False, False, True, False]), torch.tensor([4]))
    with pytest.raises(ValueError, match="no two answer tokens in a row"):
        ttt_loss(draft(target), packed, Features([], torch.zeros(4, 32)), target.head, LossOptions(2))


def test_a_share_of_the_chains_is_an_unbiased_estimate(target: Target) -> None:
    """Loss and gradients over many draws of a third of the chains average to those of all chains.

    One chain too few or a wrong factor shifts the mean by more than the bound, five standard errors of it."""
    model, packed = draft(target), batch(9, 14, 12)
    features, head = target.features(packed), target.head.of(model.target_ids)
    names = ["fc.weight", "lm_head.weight", "layers.0.self_attn.k_proj.weight"]
    parameters = [model.get_parameter(name) for name in names]

    def gradients(share: float, seed: int) -> list[torch.Tensor]:
        options = LossOptions(4, chain_share=share)
        loss, steps = ttt_loss(model, packed, features, head, options, torch.Generator().manual_seed(seed))
        return [steps, loss.detach()[None], *torch.autograd.grad(loss, parameters)]

    want = gradients(1.0, 0)
    draws = [gradients(0.34, seed) for seed in range(200)]
    for i, exact in enumerate(want):
        drawn = torch.stack([d[i] for d in draws])
        error = (drawn.mean(0) - exact).norm()
        spread = drawn.std(0).norm() / len(draws) ** 0.5
        assert float(error) < 5 * float(spread) + 1e-6, i
        if i:
            assert float(drawn.std(0).norm()) > 0, "the draws differ"


def test_chains_beyond_step_one_are_a_share_of_those_that_have_one() -> None:
    packed = batch(30, 20)
    chains = Chains.build(packed, 3, 0.25, torch.Generator().manual_seed(1))
    assert chains.candidates == int(chains.valid[1].sum())
    assert len(chains.later) == -(-chains.candidates // 4) and chains.valid[1, chains.later].all()
    weights = torch.tensor([0.5, 0.3, 0.2])
    (_, first), (_, second), (third, scale) = chains.scored(weights)
    torch.testing.assert_close(first.sum(), weights[0])
    torch.testing.assert_close(second.sum(), weights[1])
    assert chains.valid[2, third].all()
    torch.testing.assert_close(scale[0], 0.2 / chains.valid[2].sum() * chains.candidates / len(chains.later))
