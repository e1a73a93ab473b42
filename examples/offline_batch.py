"""Answers a batch of prompts with plain `vllm.LLM`: python examples/offline_batch.py [TARGET DRAFT]."""

import sys

from vllm import LLM, SamplingParams

from vllm_eagle3.evaluation.demo_models import default_pair

if __name__ == "__main__":
    target, draft = map(str, sys.argv[1:] or default_pair())
    llm = LLM(
        target,
        max_model_len=1024,
        enforce_eager=True,  # starts sooner; remove it for speed
        kv_cache_memory_bytes=2**28,
        speculative_config={"method": "eagle3", "model": draft, "num_speculative_tokens": 3},
    )
    prompts = ["The capital of France is", "Water boils at", "Two plus two makes"]
    for output in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=32)):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
