"""Which model runner an engine on a CPU gets (10 s)."""

import logging

import pytest
from engines import speculative, token_ids
from vllm import SamplingParams, envs
from vllm.engine.arg_utils import EngineArgs
from vllm.triton_utils import HAS_TRITON

from vllm_eagle3.runner import ledger
from vllm_eagle3.runner.hooks import native_v2

ledger.install()
pytestmark = pytest.mark.skipif(HAS_TRITON, reason="vLLM chooses where Triton works")


@pytest.fixture(autouse=True)
def nobody_asks(monkeypatch):
    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    envs.disable_envs_cache()
    native_v2._warn_of_v1.cache_clear()
    logging.getLogger("vllm").propagate = True


@pytest.fixture
def uses_v2(closed_form_target, closed_form_draft):
    """`uses_v2(draft=..., **EngineArgs kwargs)`: whether such an engine runs on V2."""

    def build(draft=closed_form_draft, **kwargs):
        if draft is not None:
            kwargs["speculative_config"] = speculative(draft, 3)
        given = {"model": str(closed_form_target), "dtype": "float32", "skip_tokenizer_init": True} | kwargs
        return EngineArgs(**given).create_engine_config().use_v2_model_runner

    return build


def test_v2_serves_eagle3_and_nothing_else(uses_v2):
    assert uses_v2()
    assert not uses_v2(draft=None)


@pytest.mark.parametrize("asked", ["0", "1"])
def test_the_variable_wins(uses_v2, monkeypatch, asked):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", asked)
    assert uses_v2() == uses_v2(draft=None) == (asked == "1")


def test_what_was_not_tried_stays_on_v1_and_says_so(uses_v2, caplog):
    assert not uses_v2(enable_lora=True, enable_prompt_embeds=True)
    assert not uses_v2(enable_lora=True, enable_prompt_embeds=True)
    (warning,) = [
        r.getMessage() for r in caplog.records if "V1 runner" in r.getMessage() and r.name == "vllm.eagle3"
    ]
    assert warning.endswith("because of prompt embeddings, LoRA")


def test_another_version_of_vllm_stays_on_v1(uses_v2, monkeypatch):
    monkeypatch.setattr(native_v2, "vllm_version", "0.33.0")
    assert not uses_v2()


def test_an_engine_says_once_which_runner_it_has(engine, closed_form_target, closed_form_draft, caplog):
    with caplog.at_level(logging.INFO, "vllm.eagle3"):
        llm = engine(closed_form_target, speculative_config=speculative(closed_form_draft, 3))
        token_ids(llm, [[3]], SamplingParams(temperature=0, max_tokens=4, detokenize=False))
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert type(worker.model_runner).__module__ == "vllm.v1.worker.cpu.model_runner"
    said = [r.getMessage() for r in caplog.records if r.name == "vllm.eagle3" and "runner" in r.getMessage()]
    assert len(said) == 1 and "on the V2 runner" in said[0]
