"""Steps at start-up that only a GPU's worker has: profiling without a KV cache, dummy batches, warm-up (60 s)."""

import random

import pytest
import torch
from engines import running, speculative, token_ids
from vllm import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True, detokenize=False)
SIZES = {"max_num_seqs": 4, "max_num_batched_tokens": 128, "max_model_len": 256}


@pytest.mark.parametrize(
    "options",
    [{}, {"policy": "auto"}, {"tree": {"depth": 4, "topk": 3, "nodes": 10}},
     {"tree": {"depth": 4, "topk": 3, "nodes": 10}, "policy": "auto"}],
    ids=["chain", "chain-auto", "tree", "tree-auto"],
)  # fmt: skip
def test_start_as_on_a_gpu(engine, models, monkeypatch, options):
    from vllm.v1.worker.gpu import cudagraph_utils
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup, warmup_kernels

    rng = random.Random(2)
    prompts = [[rng.randrange(512) for _ in range(n)] for n in (5, 60, 20)]
    with running(models[0], **SIZES) as llm:
        expected = token_ids(llm, prompts, GREEDY)
    profiled, original = [], GPUModelRunner.initialize_kv_cache

    def initialize_kv_cache(self, *args, is_profiling=False, **kwargs):
        if not is_profiling:
            self._dummy_run(self.max_num_tokens, skip_attn=True, is_profile=True)
            # As when the memory of CUDA graphs is measured: a small cache for a while.
            blocks, self.compilation_config.max_cudagraph_capture_size = self.cache_config.num_gpu_blocks, 4
            cudagraph_utils._init_minimal_kv_cache_for_profiling(self)
            self._dummy_run(8)
            self.speculator.capture()
            for name, value in list(vars(self.speculator).items()):
                if isinstance(value, cudagraph_utils.CudaGraphManager):
                    setattr(self.speculator, name, None)
            cudagraph_utils._teardown_profiling_state(self)
            self.cache_config.num_gpu_blocks = blocks  # which a GPU's engine knows only now
            profiled.append(self)
        return original(self, *args, is_profiling=is_profiling, **kwargs)

    monkeypatch.setattr(GPUModelRunner, "initialize_kv_cache", initialize_kv_cache)
    monkeypatch.setattr(cudagraph_utils.CudaGraphManager, "capture", lambda *args, **kwargs: None)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(torch.accelerator, name, lambda: None)
    llm = engine(
        models[0],
        speculative_config=speculative(models[1], 10 if "tree" in options else 3),
        additional_config={"eagle3": options},
        **SIZES,
    )
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    runner = worker.model_runner
    assert profiled == [runner]
    for size in (128, 5, 1):
        runner._dummy_run(size)
    runner._dummy_run(2 * runner.decode_query_len, uniform_decode=True)
    warmup_kernels(runner, worker.execute_model, worker.sample_tokens)
    assert run_mixed_prefill_decode_warmup(runner, worker.execute_model, worker.sample_tokens, 40)
    assert token_ids(llm, prompts, GREEDY) == expected
