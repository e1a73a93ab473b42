"""Model Runner V2 under Triton's interpreter: closed-form text, plain and speculative; a spawned core (60 s)."""

import os
import subprocess
import sys

import pytest
from closed_form import expected_accepted, greedy_text
from engines import speculative, token_ids
from vllm import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)


@pytest.mark.parametrize(("tokens", "batch"), [(0, 4), (3, 1), (3, 4)])
def test_closed_form_text(engine, closed_form_target, closed_form_draft, tokens, batch):
    extra = {"speculative_config": speculative(closed_form_draft, tokens)} if tokens else {}
    llm = engine(closed_form_target, **extra)
    assert llm.llm_engine.vllm_config.use_v2_model_runner
    prompts = [[3, 9, 27 + i] for i in range(batch)]
    assert token_ids(llm, prompts, GREEDY) == [greedy_text(p[-1], 16) for p in prompts]


def test_acceptance_is_as_predicted(engine, closed_form_target, closed_form_draft):
    llm = engine(closed_form_target, speculative_config=speculative(closed_form_draft, 3))
    token_ids(llm, [[3, 9, 27]], GREEDY)
    text = [27, *greedy_text(27, 16)]
    done, steps, accepted = 1, 0, 0  # the prompt's step emits one token
    while done < 16:
        step = expected_accepted(text[done], min(3, 16 - done), 5)
        done, steps, accepted = done + step + 1, steps + 1, accepted + step
    metrics = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    assert metrics["vllm:spec_decode_num_accepted_tokens"] == accepted
    assert metrics["vllm:spec_decode_num_drafts"] == steps


@pytest.mark.slow
def test_spawned_engine_core(closed_form_target):
    """The platform plugin alone installs the interpreter, in the main process and in a spawned engine core."""
    code = f"""
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    llm = LLM({str(closed_form_target)!r}, dtype="float32", max_model_len=64, enforce_eager=True,
              max_num_seqs=2, skip_tokenizer_init=True, kv_cache_memory_bytes=2**26)
    assert llm.llm_engine.vllm_config.use_v2_model_runner
    sp = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    print("IDS", list(llm.generate([dict(prompt_token_ids=[3, 9, 27])], sp,
    use_tqdm=False)[0].outputs[0].token_ids))
"""
    env = os.environ | {
        "EAGLE3_INTERPRET": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_WORKER_MULTIPROCESSING_METHOD": "spawn",
        "PYTHONPATH": "",
    }
    env.pop("VLLM_USE_V2_MODEL_RUNNER", None)
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=180)
    assert f"IDS {greedy_text(27, 4)}" in done.stdout, done.stdout + done.stderr
