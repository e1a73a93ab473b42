"""Rows of docs/compatibility.md on the V1 runner and a CPU, on small models (4 minutes)."""

import pytest
from adapters import write_adapter
from dialects import Dims, draft_tensors, write_dialect
from engines import SMALL, running, speculative, token_ids
from quantised import write_int8_draft, write_int8_target
from random_llama import write_draft, write_target
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.engine.arg_utils import EngineArgs

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
PROMPTS = [[(31 * i + 7 * j) % 512 for j in range(5 + 9 * i)] for i in range(3)]
DRAFTS = "vllm:spec_decode_num_drafts"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("random")
    return write_target(folder / "target"), write_draft(folder / "draft")


@pytest.fixture(scope="module")
def expected(models):
    with running(models[0]) as llm:
        return token_ids(llm, PROMPTS, GREEDY)


def verifications(llm):
    return {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}.get(DRAFTS, 0)


def test_a_draft_on_one_rank_of_two(engine, models, expected, monkeypatch):
    monkeypatch.setenv("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")
    config = speculative(models[1], 3, draft_tensor_parallel_size=1)
    llm = engine(models[0], speculative_config=config, tensor_parallel_size=2)
    assert token_ids(llm, PROMPTS, GREEDY) == expected
    assert verifications(llm) > 20


def test_lora_on_the_target(models, expected, tmp_path):
    from vllm.lora.request import LoRARequest

    adapter = LoRARequest("adapter", 1, str(write_adapter(tmp_path / "adapter")))
    lora = {"enable_lora": True, "max_lora_rank": 8}

    def answers(llm, request):
        prompts = [{"prompt_token_ids": p} for p in PROMPTS]
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False, lora_request=request)
        return [list(output.outputs[0].token_ids) for output in outputs]

    with running(models[0], **lora) as llm:
        adapted = answers(llm, adapter)
    assert adapted != expected, "the adapter changes the text"
    with running(models[0], speculative_config=speculative(models[1], 3), **lora) as llm:
        assert answers(llm, adapter) == adapted
        assert answers(llm, None) == expected
        assert verifications(llm) > 20


def test_a_speculators_checkpoint_by_its_own_name(models, expected, tmp_path):
    dims = Dims(
        hidden=128, target_hidden=128, heads=4, kv_heads=2, head_dim=32, intermediate=256, vocab=512,
        draft_vocab=512, target_layers=4, max_position=2048,
    )  # fmt: skip
    draft = write_dialect(
        tmp_path / "draft", "speculators", draft_tensors(dims), dims, aux_layers=(1, 2, 4),
        verifier=str(models[0]),
    )  # fmt: skip
    llm = LLM(model=str(draft), kv_cache_memory_bytes=1 << 28, **SMALL)
    try:
        core = llm.llm_engine.engine_core.engine_core
        drafter = core.model_executor.driver_worker.worker.model_runner.drafter
        assert type(drafter).__name__ == "Eagle3Proposer" and drafter.draft_config is not None
        assert token_ids(llm, PROMPTS, GREEDY) == expected
        assert verifications(llm) > 5
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


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
    assert verifications(llm) > 20


def test_fp8_kv_cache(engine, models):
    """The text is that of the same cache without drafts."""
    with running(models[0], kv_cache_dtype="fp8") as llm:
        expected = token_ids(llm, PROMPTS, GREEDY)
    llm = engine(models[0], speculative_config=speculative(models[1], 3), kv_cache_dtype="fp8")
    assert token_ids(llm, PROMPTS, GREEDY) == expected
    assert verifications(llm) > 10


def test_other_methods_are_vllms(engine, models, expected):
    config = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}
    llm = engine(models[0], speculative_config=config)
    assert not hasattr(llm.llm_engine.engine_core.engine_core.scheduler, "draft_is_useless")
    assert token_ids(llm, PROMPTS, GREEDY) == expected


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"rejection_sample_method": "block"}, "V1 runner has no rejection_sample_method 'block'"),
        (
            {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 2.0},
            "no synthetic acceptance on a CPU",
        ),
        ({"pipeline_parallel_size": 2}, "does not speculate over several pipeline stages"),
    ],
    ids=["block", "synthetic", "two stages"],
)
def test_what_the_v1_runner_does_not_do_is_refused(models, given, text):
    arguments = EngineArgs(
        model=str(models[0]),
        skip_tokenizer_init=True,
        max_model_len=128,
        pipeline_parallel_size=given.pop("pipeline_parallel_size", 1),
        speculative_config=speculative(models[1], 3, **given),
    )
    with pytest.raises(ValueError, match=text):
        arguments.create_engine_config()
