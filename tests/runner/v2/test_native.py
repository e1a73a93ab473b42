"""Model Runner V2 on a CPU without Triton: the V1 runner's greedy texts, plain and speculative (60 s)."""

import os
import random

import pytest
from engines import running, speculative, token_ids
from vllm import SamplingParams, envs
from vllm.triton_utils import HAS_TRITON

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
    asked = os.environ.pop("VLLM_USE_V2_MODEL_RUNNER", None)
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    envs.disable_envs_cache()
    try:
        with running(models[0], **SIZES) as llm:
            assert type(runner(llm)).__module__ == "vllm.v1.worker.cpu_model_runner"
            return token_ids(llm, prompts, params)
    finally:
        os.environ.pop("VLLM_USE_V2_MODEL_RUNNER")
        if asked is not None:
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = asked
        envs.disable_envs_cache()


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
