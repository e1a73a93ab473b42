"""Trees with the attention and the kernels for GPUs, all of them interpreted (2 min)."""

import random
import sys

import torch
from engines import running, speculative, token_ids
from launch_budget import Launches
from random_llama import write_draft, write_target
from tree_oracle import oracle
from vllm import SamplingParams

SIZES = {"max_num_seqs": 3, "max_num_batched_tokens": 64, "max_model_len": 256}
OPTIONS = {"eagle3": {"tree": {"depth": 4, "topk": 3, "nodes": 10}}}
# Torch operations a step of the bookkeeping of trees, with some room. Growth is in a CUDA graph on a GPU, the rest is
# launched one by one.
BUDGET = {"kernels/tree_growth.py": 8, "runner/v2/tree_state.py": 30, "runner/v2/accepted_rows.py": 60}
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)


def test_trees_on_gpu_kernels(engine, tmp_path, monkeypatch):
    from vllm_eagle3 import kernels
    from vllm_eagle3.kernels import split_kv
    from vllm_eagle3.model.draft import Eagle3LlamaDraft
    from vllm_eagle3.runner.v2 import tree_attention

    target, draft = write_target(tmp_path / "target"), write_draft(tmp_path / "draft")
    rng = random.Random(4)
    prompts = [[rng.randrange(512) for _ in range(n)] for n in (5, 70, 20)]
    with running(target, **SIZES) as llm:
        expected = token_ids(llm, prompts, GREEDY)

    used, launched = ("tree_attention", "path_attention", "tree_walk", "commit_kv", "head_topk"), set()
    for name in used:

        def triton(backend, *tensors, name=name):
            launched.add(name)
            return "triton"

        monkeypatch.setattr(sys.modules[getattr(kernels, name).__module__], "choose_backend", triton)
    monkeypatch.setattr(split_kv, "num_sms", lambda device: 8)  # few programs
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(Eagle3LlamaDraft, "_fuses_head", lambda self, x: True)

    class OnACPU(tree_attention.TreeTritonAttentionBackend):
        """The backend under the name of the CPU's only backend, which the platform looks up."""

        @staticmethod
        def get_name():
            return "CPU_ATTN"

    monkeypatch.setattr(tree_attention, "TreeCPUAttentionBackend", OnACPU)
    llm = engine(target, speculative_config=speculative(draft, 10), additional_config=OPTIONS, **SIZES)
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    assert {type(layer.impl) for layer in layers} == {tree_attention.TreeTritonAttentionImpl}
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    worker.model_runner.speculator.growth = kernels.TreeGrowth
    assert token_ids(llm, prompts, GREEDY) == expected
    assert launched == set(used)
    with oracle([p + t for p, t in zip(prompts, expected, strict=True)], 512) as seen:
        llm.reset_prefix_cache()
        assert token_ids(llm, prompts, GREEDY) == expected
    assert seen.accepted > 8
    llm.reset_prefix_cache()
    steps, step = [], llm.llm_engine.step
    monkeypatch.setattr(llm.llm_engine, "step", lambda: steps.append(1) or step())
    with Launches() as launches:
        assert token_ids(llm, prompts[:1], GREEDY) == expected[:1]
    per_step = {name: count / len(steps) for name, count in launches.counts.items()}
    assert set(per_step) >= set(BUDGET), per_step
    assert all(per_step[name] <= most for name, most in BUDGET.items()), per_step
