"""Full CUDA graphs of verification and of the tree's growth, recorded and replayed on a CPU (40 s)."""

import random

from engines import running, speculative, token_ids
from recorded_graphs import capture, record_graphs
from vllm import SamplingParams
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager, ModelCudaGraphManager

SIZES = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 256}
NODES = 10
OPTIONS = {"eagle3": {"tree": {"depth": 4, "topk": 3, "nodes": NODES}}}
LENGTHS = (9, 6, 12, 24, 4)  # of the answers, so that all batch sizes occur


def test_trees_in_graphs(engine, models, monkeypatch):
    """Graphs are recorded once per batch size. Replays, padded or not, give the right trees and text in each step."""
    from vllm_eagle3.runner.v2.tree_speculator import TreeSpeculator

    rng = random.Random(1)
    prompts = [[rng.randrange(512) for _ in range(n)] for n in (3, 70, 33, 120, 9)]
    greedy = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in LENGTHS]
    with running(models[0], **SIZES) as llm:
        expected = token_ids(llm, prompts, greedy)

    grown, original = [], TreeSpeculator.propose

    def propose(self, input_batch, *args, **kwargs):
        tokens = original(self, input_batch, *args, **kwargs)
        parents = self.parents[: input_batch.num_reqs]
        grown[-1].append((input_batch.num_reqs, tokens.tolist(), parents.tolist()))
        return tokens

    replayed = record_graphs(monkeypatch, [1, 2, 4, 8, 16, 24, 32, 40, 48])
    llm = engine(
        models[0], speculative_config=speculative(models[1], NODES), additional_config=OPTIONS, **SIZES
    )
    monkeypatch.setattr(TreeSpeculator, "propose", propose)
    for recorded in (False, True):
        if recorded:
            capture(llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner)
        grown.append([])
        assert token_ids(llm, prompts, greedy) == expected
        llm.reset_prefix_cache()
    assert {batch for batch, _, _ in grown[1]} == {1, 2, 3, 4}
    assert grown[0] == grown[1]
    assert set(replayed[CudaGraphManager]) == {1, 2, 4}  # growth
    assert set(replayed[ModelCudaGraphManager]) >= {1, 2}  # verification
