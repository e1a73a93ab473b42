"""Rows of docs/compatibility.md on the V2 runner and a CPU, on small models, chains and trees (4 minutes)."""

import pytest
from engines import running, speculative, token_ids
from quantised import write_int8_draft, write_int8_target
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
PROMPTS = [[(31 * i + 7 * j) % 512 for j in range(5 + 9 * i)] for i in range(3)]
TREE = {"eagle3": {"tree": {"depth": 3, "topk": 2, "nodes": 6}}}


@pytest.fixture(scope="module")
def expected(models):
    with running(models[0]) as llm:
        return token_ids(llm, PROMPTS, GREEDY)


def verifications(llm):
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return found.get("vllm:spec_decode_num_drafts", 0)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ({}, {}),
        ({"draft_tensor_parallel_size": 1}, {}),
        ({}, TREE),
    ],
    ids=["chain", "draft on one rank", "tree"],
)
def test_two_ranks(engine, models, expected, monkeypatch, given, options):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
    llm = engine(
        models[0],
        speculative_config=speculative(models[1], 6, **given),
        tensor_parallel_size=2,
        additional_config=options,
    )
    assert token_ids(llm, PROMPTS, GREEDY) == expected
    assert verifications(llm) > 10


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"pipeline_parallel_size": 2}, "stops answering on a CPU where it speculates over several"),
        ({"enable_lora": True}, "does not speculate with LoRA on a CPU"),
        ({"enable_adaptive_verification": True}, "Adaptive verification requires full CUDA graphs"),
    ],
    ids=["two stages", "LoRA", "adaptive verification"],
)
def test_what_is_refused_on_a_cpu(models, given, text):
    arguments = EngineArgs(
        model=str(models[0]),
        skip_tokenizer_init=True,
        max_model_len=128,
        pipeline_parallel_size=given.pop("pipeline_parallel_size", 1),
        enable_lora=given.pop("enable_lora", False),
        speculative_config=speculative(models[1], 3, **given),
    )
    with pytest.raises(ValueError, match=text):
        arguments.create_engine_config()


def test_numbers_of_drafts_by_batch_size(engine, models, expected):
    table = [(1, 1, 4), (2, 2, 2), (3, 8, 0)]
    llm = engine(
        models[0],
        speculative_config=speculative(models[1], 4, num_speculative_tokens_per_batch_size=table),
        additional_config={"eagle3": {"policy": "auto"}},
    )
    scheduler, told = llm.llm_engine.engine_core.engine_core.scheduler, set()
    update = scheduler.update_from_output

    def noted(step, output):
        told.add((len(step.num_scheduled_tokens), step.num_spec_tokens_to_schedule))
        return update(step, output)

    scheduler.update_from_output = noted
    lengths = [
        SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in (8, 16, 24)
    ]
    found = token_ids(llm, PROMPTS, lengths)
    assert found == [text[:n] for text, n in zip(expected, (8, 16, 24), strict=True)]
    assert told >= {(1, 4), (2, 2), (3, 0)}


def test_block_rejection(engine, models, expected):
    llm = engine(models[0], speculative_config=speculative(models[1], 3, rejection_sample_method="block"))
    assert token_ids(llm, PROMPTS, GREEDY) == expected
    assert verifications(llm) > 10


def test_synthetic_rejection(engine, models):
    """It accepts by a given rate whatever the target says: for measurements."""
    config = speculative(models[1], 3, rejection_sample_method="synthetic", synthetic_acceptance_length=3.0)
    llm = engine(models[0], speculative_config=config)
    assert [len(text) for text in token_ids(llm, PROMPTS, GREEDY)] == [24] * 3
    found = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    drafts, accepted = (found[f"vllm:spec_decode_num_{name}"] for name in ("drafts", "accepted_tokens"))
    assert 1.3 < accepted / drafts < 2.7


@pytest.mark.parametrize("quantised", ["target", "draft"])
def test_int8_weights(engine, models, expected, tmp_path, quantised):
    """Of a target (the text is that of the quantised target) or of a draft (the text does not change)."""
    target, draft = models
    if quantised == "target":
        target = write_int8_target(tmp_path / "target")
        with running(target) as llm:
            expected = token_ids(llm, PROMPTS, GREEDY)
    else:
        draft = write_int8_draft(tmp_path / "draft")
    llm = engine(target, speculative_config=speculative(draft, 3))
    assert token_ids(llm, PROMPTS, GREEDY) == expected
    assert verifications(llm) > 10


def test_fp8_kv_cache(engine, models):
    """The text is that of the same cache without drafts."""
    with running(models[0], kv_cache_dtype="fp8") as llm:
        expected = token_ids(llm, PROMPTS, GREEDY)
    llm = engine(models[0], speculative_config=speculative(models[1], 3), kv_cache_dtype="fp8")
    assert token_ids(llm, PROMPTS, GREEDY) == expected
    assert verifications(llm) > 10
