"""Simulated step j of training gives the logits of step j of the chain that vLLM drafts (fp32, 40 s)."""

import pytest
import torch
from dialects import Dims, draft_tensors, write_dialect
from engines import speculative, token_ids
from random_llama import write_target
from vllm import SamplingParams

from vllm_eagle3.reference.draft import load_draft
from vllm_eagle3.training.data import Batch
from vllm_eagle3.training.features import Target
from vllm_eagle3.training.ttt import Chains, simulate

STEPS = 5
AUX = (1, 2, 4)
PROMPT = [(31 * i + 7) % 512 for i in range(23)]
FLAGS = [
    {},
    {"fc_norm": True, "norm_output": True},
    {"norm_before_fc": True, "norm_before_residual": True},
]


def drafted(llm):
    """(first sampled token, drafts [STEPS], their logits [STEPS, draft_vocab]) of the prompt's first proposal."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    drafter = worker.model_runner.drafter
    model, propose, top = drafter.model, drafter.propose, drafter.model.get_top_tokens
    seen, logits = [], []

    def record(*args, **kwargs):
        logits.clear()
        ids = propose(*args, **kwargs)
        seen.append(
            (int(args[4][0] if len(args) > 4 else kwargs["next_token_ids"][0]), ids[0], torch.cat(logits))
        )
        return ids

    def record_logits(hidden_states):
        logits.append(model.draft_logits(hidden_states))
        return top(hidden_states)

    drafter.propose, model.get_top_tokens = record, record_logits
    token_ids(llm, [PROMPT], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False))
    return seen[0]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda f: "+".join(f) or "plain")
def test_logits_of_every_step(engine, tmp_path, flags):
    dims = Dims(hidden=128, target_hidden=128, heads=4, kv_heads=2, head_dim=32, intermediate=256, vocab=512,
                draft_vocab=200, target_layers=4, max_position=64)  # fmt: skip
    weights = {name: flags.get(name, False) for name in ("norm_before_fc", "fc_norm")}
    target = write_target(tmp_path / "target")
    draft = write_dialect(
        tmp_path / "draft", "specforge", draft_tensors(dims, **weights), dims, aux_layers=AUX, **flags
    )
    sampled, drafts, served = drafted(engine(target, speculative_config=speculative(draft, STEPS)))
    tokens = torch.tensor([*PROMPT, sampled, *drafts.tolist()])
    batch = Batch(tokens, torch.ones(len(tokens), dtype=torch.bool), torch.tensor([len(tokens)]))
    reader = Target(target, AUX, torch.float32)
    model = load_draft(draft, embeddings=reader.embeddings)
    chains = Chains.build(batch, STEPS)
    row = chains.rows.tolist().index(len(PROMPT) - 1)
    with torch.no_grad():
        states = simulate(model, batch, reader.features(batch), chains, STEPS).states
        later = chains.later.tolist().index(row)
        trained = torch.stack([model.logits(a[later if j else row]) for j, a in enumerate(states)])
    torch.testing.assert_close(served.float(), trained, atol=1e-4, rtol=1e-4)
    assert model.draft_to_target(trained.argmax(-1)).tolist() == drafts.tolist()
