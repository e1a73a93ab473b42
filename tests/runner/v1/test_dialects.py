"""The same weights in each dialect draft the same tokens, and those that vLLM's own layer drafts (150 s)."""

import pytest
import torch
from dialects import DIALECTS, Dims, draft_tensors, write_dialect
from engines import speculative, token_ids
from random_llama import write_target
from safetensors.torch import load_file
from vllm import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False)
PROMPTS = [[(31 * i + 7 * j) % 512 for j in range(5 + 9 * i)] for i in range(3)]
AUX = (1, 2, 4)
SIZES = {
    "hidden": 128,
    "target_hidden": 128,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 32,
    "intermediate": 256,
    "vocab": 512,
    "draft_vocab": 200,
    "target_layers": 4,
    "max_position": 64,  # shorter than the engine's max_model_len
}


def drafts(llm, direct=True):
    """All drafts of a run, in order."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    drafter = worker.model_runner.drafter
    drafter.direct = direct
    seen, propose = [], drafter.propose

    def record(*args, **kwargs):
        ids = propose(*args, **kwargs)
        seen.append(ids.tolist())
        return ids

    drafter.propose = record
    text = token_ids(llm, PROMPTS, GREEDY)
    drafter.propose = propose
    return text, seen


def fused(tensors, states):
    """g by the definition, in plain torch."""
    norm = torch.nn.functional.rms_norm
    chunks = states.chunk(states.shape[-1] // tensors["fc.weight"].shape[0], dim=-1)  # widths are equal here
    if "fc_norm.0.weight" in tensors:
        chunks = [norm(c, c.shape[-1:], tensors[f"fc_norm.{i}.weight"], 1e-5) for i, c in enumerate(chunks)]
    states = torch.cat(list(chunks), dim=-1)
    if "input_norm.weight" in tensors:
        states = norm(states, states.shape[-1:], tensors["input_norm.weight"], 1e-5)
    return states @ tensors["fc.weight"].T


@pytest.mark.parametrize(
    ("model_type", "flags"),
    [
        ("llama", {"norm_before_residual": True, "fc_norm": True, "norm_output": True}),
        ("qwen3", {"norm_before_residual": False, "norm_before_fc": True}),
    ],
)
def test_dialects_draft_the_same(engine, tmp_path, model_type, flags):
    dims = Dims(**SIZES, model_type=model_type)
    weights = {name: flags.get(name, False) for name in ("norm_before_fc", "fc_norm")}
    tensors = draft_tensors(dims, **weights)
    target = write_target(tmp_path / "target")
    plain = token_ids(engine(target), PROMPTS, GREEDY)
    found = {}
    for dialect in DIALECTS:
        architectures = {"architectures": ["Eagle3Qwen3ForCausalLM"]}
        config = architectures if model_type == "qwen3" and dialect != "speculators" else None
        draft = write_dialect(
            tmp_path / dialect, dialect, tensors, dims, aux_layers=AUX, config=config, **flags
        )
        options = {"eagle3": {"aux_layers": list(AUX)}} if dialect == "safeailab" else {}
        llm = engine(target, speculative_config=speculative(draft, 4), additional_config=options)
        text, found[dialect] = drafts(llm)
        assert text == plain
        states = torch.randn(5, 3 * dims.target_hidden)
        model = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.drafter.model
        torch.testing.assert_close(
            model.combine_hidden_states(states), fused(tensors, states), atol=1e-4, rtol=1e-4
        )
        if dialect == "modelopt":
            llm.reset_prefix_cache()
            assert drafts(llm, direct=False) == (plain, found[dialect])
    assert len({str(drafted) for drafted in found.values()}) == 1


@pytest.mark.parametrize(
    ("model_type", "ids", "flags"),
    [("llama", (4,), {}), ("llama", (0, 1, 2, 3, 4), {"fc_norm": True}), ("qwen3", (1, 4), {})],
)
def test_any_number_of_states(engine, tmp_path, model_type, ids, flags):
    dims = Dims(**SIZES, model_type=model_type)
    tensors = draft_tensors(dims, states=len(ids), **flags)
    target = write_target(tmp_path / "target")
    plain = token_ids(engine(target), PROMPTS, GREEDY)
    config = {"architectures": ["Qwen3ForCausalLM"]} if model_type == "qwen3" else None
    draft = write_dialect(
        tmp_path / "draft", "safeailab", tensors, dims, aux_layers=ids, config=config, **flags
    )
    llm = engine(target, speculative_config=speculative(draft, 3))
    states = torch.randn(5, len(ids) * dims.target_hidden)
    model = (
        llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.drafter.model
    )
    torch.testing.assert_close(
        model.combine_hidden_states(states), fused(tensors, states), atol=1e-4, rtol=1e-4
    )
    text, direct = drafts(llm)
    assert text == plain
    llm.reset_prefix_cache()
    assert drafts(llm, direct=False) == (plain, direct), "vLLM's own layer drafts the same"


def test_a_missing_head_is_the_targets_rows(engine, tmp_path):
    """Stock vLLM shares the target's head instead, whose first rows are not the draft's vocabulary."""
    dims = Dims(**SIZES)
    tensors = draft_tensors(dims)
    target = write_target(tmp_path / "target")
    head = load_file(target / "model.safetensors")["lm_head.weight"]
    tensors["lm_head.weight"] = head[tensors["d2t"] + torch.arange(dims.draft_vocab)]
    found = []
    for name in ("whole", "headless"):
        draft = write_dialect(tmp_path / name, "specforge", tensors, dims, aux_layers=AUX)
        found.append(drafts(engine(target, speculative_config=speculative(draft, 2))))
        tensors.pop("lm_head.weight", None)
    assert found[0] == found[1]
