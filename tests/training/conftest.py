"""A tiny target (7 layers, 96 tokens) and rows of its vocabulary, for all tests of training."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 96


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in fp32, whose states have an outlier channel as real ones do."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=7,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        rope_theta=10000.0,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("tiny-target")
    model = LlamaForCausalLM(config).float()
    model.lm_head.weight.data *= 4  # a target that is sure of its next token
    model.save_pretrained(path)
    return path


def rows(count: int, seed: int = 0, longest: int = 40) -> list[dict[str, Any]]:
    """Rows with a little structure: an answer counts up from the last token of its prompt."""
    rng = np.random.default_rng(seed)
    out: list[dict[str, Any]] = []
    for i in range(count):
        prompt = rng.integers(3, VOCAB, rng.integers(2, 9)).tolist()
        answer = [(prompt[-1] + k) % 60 + 3 for k in range(int(rng.integers(3, longest)))]
        out.append(
            {
                "id": f"r{seed}-{i}",
                "source": "counting" if i % 2 else "other",
                "temperature": float(i % 2),
                "prompt_token_ids": prompt,
                "response_token_ids": answer,
                "finish_reason": "stop",
            }
        )
    return out


def write_rows(path: Path, data: list[dict[str, Any]]) -> Path:
    with gzip.open(path, "wt") as out:
        out.writelines(json.dumps(row) + "\n" for row in data)
    return path


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> Path:
    """Sixty rows, of which those at temperature 0 are the target's own greedy answers."""
    model, made = LlamaForCausalLM.from_pretrained(tiny_target), rows(60)
    for row in made[::2]:
        prompt, length = row["prompt_token_ids"], len(row["response_token_ids"])
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=length, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        row["response_token_ids"] = out[0, len(prompt) :].tolist()
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl.gz", made)
