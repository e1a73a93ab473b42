"""The engines that answer prompts: vLLM in one of its modes, and the reference decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, Protocol

import torch
from tqdm import tqdm

from vllm_eagle3.evaluation.metrics import TaskRun, count_chain, covered_seconds
from vllm_eagle3.evaluation.settings import GRAFT, EvalSettings, as_tree

Answer = tuple[list[int], str]  # token ids and text


class Engine(Protocol):
    """Answers prompts (token ids) and adds its counts to `run`."""

    tokenizer: Any

    def answer(self, prompts: Sequence[list[int]], run: TaskRun, label: str) -> list[Answer]: ...


class VllmEngine:
    """vLLM's offline batch. EAGLE3_DISABLE in the environment decides whether it uses this plugin."""

    def __init__(self, mode: str, settings: EvalSettings) -> None:
        from vllm import LLM

        from vllm_eagle3.runner.engine_memory import memory_arguments

        # The number of drafts is fixed, so that tau can be compared.
        options: dict[str, Any] = {"policy": "fixed", "draft_sampling": settings.draft_sampling}
        extra: dict[str, Any] = {"additional_config": {"eagle3": options}}
        drafts = 0 if mode == "none" else settings.places(mode)
        if drafts:
            extra["speculative_config"] = {
                "method": "eagle3", "model": settings.draft, "num_speculative_tokens": drafts
            }  # fmt: skip
        if as_tree(mode):
            options["tree"] = asdict(settings.shape(mode))
            options["graft"] = asdict(settings.graft) if mode.endswith(GRAFT) else False
        extra |= memory_arguments(
            settings.target,
            settings.draft if drafts else None,
            batch_size=settings.batch_size,
            max_model_len=settings.max_model_len,
            drafts=drafts,
            dtype=settings.dtype,
        )
        self.llm = LLM(
            settings.target,
            dtype=settings.dtype,
            max_model_len=settings.max_model_len,
            max_num_seqs=settings.batch_size,
            enforce_eager=settings.enforce_eager,
            enable_prefix_caching=False,
            disable_log_stats=False,  # acceptance and times are read from the engine's own counters
            seed=0,
            **extra,
        )
        self.mode, self.settings = mode, settings
        self.tokenizer = self.llm.get_tokenizer()
        self.run(self.tokens_of("Hello"), 16, "warm-up")

    def tokens_of(self, text: str) -> list[list[int]]:
        return [self.tokenizer.encode(text)] * self.settings.batch_size

    def run(self, prompts: Sequence[list[int]], max_tokens: int, label: str) -> list[Any]:
        from vllm import SamplingParams, TokensPrompt

        params = SamplingParams(temperature=self.settings.temperature, max_tokens=max_tokens)
        inputs = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        bar = partial(tqdm, leave=False) if label == "warm-up" else tqdm
        return self.llm.generate(
            inputs, params, use_tqdm=lambda *args, **kw: bar(*args, **kw | {"desc": label})
        )

    def counters(self) -> tuple[tuple[int, int, int], list[int]]:
        """Verifications, drafted and accepted tokens since the engine started; then accepted tokens by position."""
        found = {metric.name: metric for metric in self.llm.get_metrics()}
        names = ("drafts", "draft_tokens", "accepted_tokens")
        counts = [int(getattr(found.get(f"vllm:spec_decode_num_{name}"), "value", 0)) for name in names]
        positions = getattr(found.get("vllm:spec_decode_num_accepted_tokens_per_pos"), "values", [])
        return (counts[0], counts[1], counts[2]), [int(count) for count in positions]

    def answer(self, prompts: Sequence[list[int]], run: TaskRun, label: str) -> list[Answer]:
        (steps, drafted, accepted), positions = self.counters()
        outputs = self.run(prompts, self.settings.max_tokens, label)
        (steps_now, drafted_now, accepted_now), positions_now = self.counters()
        new = [now - before for before, now in zip(positions, positions_now, strict=True)]
        run.count(
            steps_now - steps, accepted_now - accepted, [] if as_tree(self.mode) else new,
            drafted_now - drafted,
        )  # fmt: skip
        run.decode_tokens += sum(len(output.outputs[0].token_ids) - 1 for output in outputs)
        spans = [(output.metrics.first_token_ts, output.metrics.last_token_ts) for output in outputs]
        run.decode_seconds = (run.decode_seconds or 0.0) + covered_seconds(spans)
        return [(list(output.outputs[0].token_ids), output.outputs[0].text) for output in outputs]


class ReferenceEngine:
    """The reference decoder (reference/decode.py), one prompt at a time. Its speed is not reported."""

    def __init__(self, mode: str, settings: EvalSettings) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from vllm_eagle3.reference.decode import chain, eagle2_tree, grafted
        from vllm_eagle3.reference.draft import load_draft

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer: Any = AutoTokenizer.from_pretrained(settings.target)
        model: Any = AutoModelForCausalLM.from_pretrained(settings.target, dtype=settings.dtype)
        self.model = model.to(device).eval()
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        draft = load_draft(
            settings.draft,
            target=settings.target,
            dtype=self.model.dtype,
            embeddings=embeddings,
            head=head,
        )
        self.draft = draft.to(device)
        tree, self.chained = settings.tree, mode == "reference-chain"  # without grafts
        self.propose = (
            chain(settings.num_speculative_tokens)
            if mode.startswith("reference-chain")
            else eagle2_tree(tree.depth, tree.topk, tree.nodes)
        )
        if mode.endswith(GRAFT):
            graft, places = settings.graft, settings.places(mode)
            self.propose = grafted(self.propose, graft.length, graft.min_match, places=places)
        self.settings = settings
        self.generator = torch.Generator(device).manual_seed(0)
        ends = self.model.generation_config.eos_token_id
        self.stop = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def answer(self, prompts: Sequence[list[int]], run: TaskRun, label: str) -> list[Answer]:
        from vllm_eagle3.reference.decode import decode

        answers, accepted, drafted = list[Answer](), list[int](), 0
        for prompt in tqdm(prompts, desc=label):
            decoded = decode(
                self.model, self.draft, prompt, self.propose, self.settings.max_tokens, self.stop,
                self.settings.temperature, self.generator,
            )  # fmt: skip
            accepted += decoded.accepted
            drafted += sum(decoded.drafted)
            run.decode_tokens += len(decoded.tokens) - 1
            text = self.tokenizer.decode(decoded.tokens, skip_special_tokens=True)
            answers.append((decoded.tokens, text))
        length = self.settings.num_speculative_tokens if self.chained else 0
        run.count(len(accepted), sum(accepted), count_chain(accepted, length), drafted)
        return answers
