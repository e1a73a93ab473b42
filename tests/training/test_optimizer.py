"""Which parameters each optimiser steps, and what the weight average is (2 s)."""

import pytest
import torch

from vllm_eagle3.training.optimizer import WeightAverage, make_optimizers


def tiny_draft() -> torch.nn.ModuleDict:
    draft = torch.nn.ModuleDict(
        {
            "embed_tokens": torch.nn.Embedding(8, 4),
            "fc": torch.nn.Linear(12, 4, bias=False),
            "norm": torch.nn.LayerNorm(4, bias=False),
            "lm_head": torch.nn.Linear(4, 6, bias=False),
        }
    )
    draft["embed_tokens"].weight.requires_grad_(False)
    return draft


def parameters(optimizer: torch.optim.Optimizer) -> set[int]:
    return {id(p) for group in optimizer.param_groups for p in group["params"]}


def test_every_trainable_parameter_is_stepped_once() -> None:
    draft = tiny_draft()
    weights = {name: id(module.weight) for name, module in draft.items()}
    (adamw,) = make_optimizers(draft, "adamw", 1e-3, 1e-3, 0.0)
    assert parameters(adamw) == {weights["fc"], weights["norm"], weights["lm_head"]}
    adamw, muon = make_optimizers(draft, "muon", 1e-3, 2e-3, 0.0)
    assert parameters(adamw) == {weights["norm"], weights["lm_head"]}
    assert parameters(muon) == {weights["fc"]}
    assert (adamw.param_groups[0]["base_lr"], muon.param_groups[0]["base_lr"]) == (1e-3, 2e-3)
    with pytest.raises(ValueError, match="adamw or muon, found 'sgd'"):
        make_optimizers(draft, "sgd", 1e-3, 1e-3, 0.0)


def test_the_average_is_exponential_and_swaps_in_and_out() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    average = WeightAverage([weight], 0.5)
    expected = torch.zeros(3)
    for step in range(1, 30):
        weight.data.fill_(step)
        average.update(step)
        keep = min(0.5, step / (step + 10))
        expected = keep * expected + (1 - keep) * weight.data
    with average.applied():
        torch.testing.assert_close(weight.data, expected)
    assert weight.tolist() == [29, 29, 29]
    with average.applied():
        torch.testing.assert_close(weight.data, expected)


def test_without_decay_there_is_no_average() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    average = WeightAverage([weight], 0.0)
    average.update(1)
    with average.applied():
        assert weight.tolist() == [1, 1]
    with pytest.raises(ValueError, match="ema: expected 0 <= decay < 1, found 1"):
        WeightAverage([weight], 1.0)
