"""Model Runner V2 on a CPU without Triton: the V1 runner's greedy texts, plain and speculative (70 s; slow: 10 min)."""

import json
import random
from pathlib import Path

import pytest
from closed_form import greedy_text, write_draft
from engines import running, speculative, token_ids
from vllm import SamplingParams, envs
from vllm.triton_utils import HAS_TRITON

from vllm_eagle3.evaluation.demo_models import default_pair
from vllm_eagle3.kernels import cpu
from vllm_eagle3.tree.growth import Growth

pytestmark = pytest.mark.skipif(HAS_TRITON, reason="the kernels' CPU forms stand in where there is no Triton")
SIZES = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 256}  # long prompts come in chunks


def runner(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(5)
    return [[rng.randrange(512) for _ in range(n)] for n in (5, 90, 20, 61, 8, 130)]


@pytest.fixture(scope="module")
def params():
    return [
        SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False)
        for n in (24, 9, 30, 14, 20, 26)
    ]


@pytest.fixture(scope="module")
def texts_of_v1(models, prompts, params):
    return on_v1(models[0], lambda llm: token_ids(llm, prompts, params), **SIZES)


def on_v1(target, answers, **settings):
    """`answers(llm)` of an engine on the V1 runner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
        envs.disable_envs_cache()
        with running(target, **settings) as llm:
            assert type(runner(llm)).__module__ == "vllm.v1.worker.cpu_model_runner"
            found = answers(llm)
    envs.disable_envs_cache()
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"num_gpu_blocks_override": 10, "block_size": 32}, {"enforce_eager": False}],
    ids=["eager", "preempted", "compiled"],
)
@pytest.mark.parametrize("tokens", [0, 3], ids=["plain", "chain"])
def test_texts_are_those_of_v1(engine, models, prompts, params, texts_of_v1, tokens, options):
    extra = {"speculative_config": speculative(models[1], tokens)} if tokens else {}
    llm = engine(models[0], **(SIZES | options | extra))
    assert type(runner(llm)).__module__ == "vllm.v1.worker.cpu.model_runner"
    assert token_ids(llm, prompts, params) == texts_of_v1


def test_trees_without_native_kernels(engine, closed_form_target, tmp_path, monkeypatch):
    """What serves where no C++ compiler is."""
    monkeypatch.setenv("EAGLE3_NATIVE", "0")
    cpu.native.cache_clear()
    try:
        llm = engine(
            closed_form_target,
            speculative_config=speculative(write_draft(tmp_path / "draft", second_best=0.5), 12),
            additional_config={"eagle3": {"tree": {"depth": 4, "topk": 3, "nodes": 12}}},
        )
        params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)
        prompts = [[3, 9, 27 + 7 * i] for i in range(3)]
        assert token_ids(llm, prompts, params) == [greedy_text(p[-1], 24) for p in prompts]
        assert runner(llm).speculator.growth is Growth
    finally:
        cpu.native.cache_clear()


@pytest.fixture(scope="module")
def real_texts():
    """`real_texts(llm)`: answers to 40 prompts; and those of the V1 runner."""
    lines = (Path(__file__).parents[2] / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [[{"role": "user", "content": json.loads(line)["turns"][0]}] for line in lines]

    def answers(llm):
        outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return answers, on_v1(default_pair()[0], answers, skip_tokenizer_init=False, max_model_len=1024)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize(
    ("drafts", "tree"), [(4, None), (12, {"depth": 4, "topk": 3, "nodes": 12})], ids=["chain", "tree"]
)
def test_real_texts_are_those_of_v1(engine, real_texts, batch, drafts, tree):
    answers, expected = real_texts
    target, draft = default_pair()
    llm = engine(
        target,
        skip_tokenizer_init=False,
        max_model_len=1024,
        max_num_seqs=batch,
        speculative_config=speculative(draft, drafts),
        additional_config={"eagle3": {"tree": tree}},
    )
    assert len(expected) == 40
    assert answers(llm) == expected
