"""Chains as a GPU drafts them, on a CPU: keys and values alone where nothing is drafted, and weights in fp8 (60 s)."""

import itertools
import random

import pytest
import torch
from engines import running, speculative, token_ids
from vllm import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
SIZES = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 256}
TURNS = [0, 3, 0, 0, 3, 3, 0, 3]  # drafts of the steps


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch, tmp_path):
    from vllm_eagle3.model.draft import Eagle3LlamaDraft
    from vllm_eagle3.runner.v2 import init_speculator

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(init_speculator, "serves", lambda *args: False)
    monkeypatch.setattr(Eagle3LlamaDraft, "_fuses_head", lambda self, states: True)


def drafts_of(llm, prompts, monkeypatch):
    """The drafts of every step in which there are any, and the text."""
    from vllm_eagle3.runner.v2.speculator import Eagle3Speculator

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    turn, made = itertools.cycle(TURNS), []
    propose = Eagle3Speculator.propose

    def noted(self, input_batch, *args, num_speculative_tokens=None, **kwargs):
        drafts = propose(self, input_batch, *args, num_speculative_tokens=num_speculative_tokens, **kwargs)
        made.append((num_speculative_tokens, drafts[:, :num_speculative_tokens].tolist()))
        return drafts

    with monkeypatch.context() as patch:
        patch.setattr(Eagle3Speculator, "propose", noted)
        patch.setattr(
            scheduler.draft_policy, "choose", lambda *_: scheduler.draft_policy.by_nodes[next(turn)]
        )
        text = token_ids(llm, prompts, GREEDY)
    llm.reset_prefix_cache()
    return made, text


def test_keys_and_values_are_enough_where_nothing_is_drafted(engine, models, monkeypatch):
    """The drafts of later steps read them: they are those of an engine that ran the whole layer."""
    from vllm_eagle3.runner.v2.speculator import Eagle3Speculator

    rng = random.Random(3)
    prompts = [[rng.randrange(512) for _ in range(n)] for n in (5, 60, 20)]
    with running(models[0], **SIZES) as llm:
        expected = token_ids(llm, prompts, GREEDY)
    options = {"eagle3": {"policy": "auto"}}
    llm = engine(models[0], speculative_config=speculative(models[1], 3), additional_config=options, **SIZES)
    written, write = [], Eagle3Speculator._write_keys_values
    monkeypatch.setattr(
        Eagle3Speculator, "_write_keys_values", lambda self, *args: written.append(1) or write(self, *args)
    )
    made, text = drafts_of(llm, prompts, monkeypatch)
    assert text == expected
    assert len(written) == sum(drafts == 0 for drafts, _ in made) > 3
    monkeypatch.setattr(Eagle3Speculator, "_writes_only", lambda self: False)
    assert drafts_of(llm, prompts, monkeypatch) == (made, text)
    assert len(written) == sum(drafts == 0 for drafts, _ in made), "the second time it ran the layer"


def test_weights_in_fp8_change_drafts_and_no_text(engine, models, monkeypatch):
    from vllm.model_executor.layers import utils

    from vllm_eagle3.model import draft, fp8

    def keep(layer, remove_weight):  # vLLM packs weights for a CPU, and frees them
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", keep)
    monkeypatch.setattr(draft, "fp8_works", lambda device: True)
    rng = random.Random(4)
    prompts = [[rng.randrange(512) for _ in range(n)] for n in (5, 30)]
    with running(models[0], **SIZES) as llm:
        expected = token_ids(llm, prompts, GREEDY)
    options = {"eagle3": {"policy": "auto", "fp8_draft": True}}
    llm = engine(models[0], speculative_config=speculative(models[1], 3), additional_config=options, **SIZES)
    model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.speculator.model
    layers = [m for m in model.modules() if isinstance(getattr(m, "quant_method", None), fp8.Fp8Method)]
    assert len(layers) == 4 and model.fp8_head is not None
    made, text = drafts_of(llm, prompts, monkeypatch)
    assert text == expected
    for layer in layers:
        scale = layer.quant_method.scale[:, None]
        layer.weight.data.copy_(layer.quant_method.w8.float() * scale)
        layer.quant_method = draft.UnquantizedLinearMethod()
    head, scale = model.fp8_head
    model.fp8_head = None
    model.lm_head.weight.data[: len(head)].copy_(head.float() * scale[:, None])
    assert drafts_of(llm, prompts, monkeypatch) == (made, text), (
        "the same drafts as weights rounded beforehand"
    )
