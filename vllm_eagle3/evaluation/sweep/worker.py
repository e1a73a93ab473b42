"""One engine of a sweep in its own process: `python -m vllm_eagle3.evaluation.sweep.worker NAME SETTINGS`.

For each line "batch size, turn" on stdin it measures one run and writes a JSON line to stdout. Everything that other
code writes to stdout goes to stderr. An engine that finds too little memory answers with {"error": message} and ends.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_eagle3.evaluation.model_shapes import SHAPES, pseudo_tokens
from vllm_eagle3.evaluation.sweep.settings import TREES, SweepSettings
from vllm_eagle3.prompts import load_prompts
from vllm_eagle3.runner.engine_memory import NotEnoughMemoryError, memory_arguments

LEAST = 8
"""The fewest prompts of a run, even if its batch is smaller."""


@dataclass
class Measurement:
    """One run at one batch size."""

    tokens: int
    seconds: float
    drafts: int  # verifications of a draft, summed over requests
    accepted: int  # drafted tokens accepted


def engine_arguments(name: str, settings: SweepSettings) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` for the engine `name` of the sweep."""
    _, mode, drafts = next(run for run in settings.runs() if run[0] == name)
    arguments: dict[str, Any] = {
        "model": settings.target,
        "dtype": settings.dtype,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": max(settings.batch_sizes),
        "enforce_eager": settings.enforce_eager,
        "enable_prefix_caching": False,
        "disable_log_stats": False,  # acceptance is read from the engine's counters
        "seed": 0,
    }
    if settings.shape is not None:
        arguments |= {"load_format": "dummy", "skip_tokenizer_init": True}
    if mode == "none":
        return arguments
    speculative: dict[str, Any] = {"method": "eagle3", "model": settings.draft}
    speculative["num_speculative_tokens"] = drafts
    if settings.shape is not None and settings.acceptance_rates:
        speculative["rejection_sample_method"] = "synthetic"
        speculative["synthetic_acceptance_rates"] = list(settings.acceptance_rates[:drafts])
    if mode == "adaptive":
        speculative["enable_adaptive_verification"] = True
    options: dict[str, Any] = {"policy": "auto" if mode.startswith("auto") else "fixed"}
    options["tree"] = asdict(settings.tree) if mode in TREES else None
    return arguments | {"speculative_config": speculative, "additional_config": {"eagle3": options}}


def reserved_memory(name: str, settings: SweepSettings) -> dict[str, Any]:
    """Keyword arguments of `vllm.LLM` with the memory that the engine `name` of the sweep needs.

    Raises:
        NotEnoughMemoryError: less is free.
    """
    _, _, drafts = next(run for run in settings.runs() if run[0] == name)
    return memory_arguments(
        settings.target,
        settings.draft if drafts else None,
        batch_size=max(settings.batch_sizes),
        max_model_len=settings.max_model_len,
        drafts=drafts,
        dtype=settings.dtype,
    )


class SweepEngine:
    """A vLLM engine that always has exactly `batch_size` requests."""

    def __init__(self, name: str, settings: SweepSettings) -> None:
        from vllm import LLM, SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.settings = settings
        self.llm = LLM(**engine_arguments(name, settings), **reserved_memory(name, settings))
        self.params = SamplingParams(
            temperature=settings.temperature,
            max_tokens=settings.max_tokens,
            ignore_eos=settings.shape is not None,  # random weights end an answer anywhere
            detokenize=settings.shape is None,
            output_kind=RequestOutputKind.DELTA,
        )
        self.prompts = self._prompts()
        self.count = itertools.count()

    def _prompts(self) -> list[list[int]]:
        turns = [prompt.turns[0] for path in self.settings.data for prompt in load_prompts(path)]
        room = self.settings.max_model_len - self.settings.max_tokens
        if self.settings.shape is not None:
            vocab = SHAPES[self.settings.shape][0]["vocab_size"]
            tokens = [pseudo_tokens(turn, vocab) for turn in turns]
        else:
            tokenizer: Any = self.llm.get_tokenizer()
            chats = [[{"role": "user", "content": turn}] for turn in turns]
            tokens = [
                tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
                for chat in chats
            ]
        fitting = [ids for ids in tokens if len(ids) <= room]
        if not fitting:
            raise ValueError(f"--max-model-len: no prompt fits into {room} tokens")
        return fitting

    def counters(self) -> tuple[int, int]:
        """Verifications and accepted drafts since the engine started."""
        values = {metric.name: int(getattr(metric, "value", 0)) for metric in self.llm.get_metrics()}
        prefix = "vllm:spec_decode_num_"
        return values.get(prefix + "drafts", 0), values.get(prefix + "accepted_tokens", 0)

    def run(self, batch_size: int, turn: int) -> Measurement:
        """Measure one run. As soon as a request finishes, the next prompt replaces it.

        The clock starts when all first requests have been admitted. It stops after `max_tokens` tokens for each of the
        `batch_size` requests, or for LEAST prompts if these are more. Run number `turn` begins in the list of prompts
        where the run before it ended, so that all engines see the same prompts in the same turn.
        """
        engine: Any = self.llm.llm_engine
        requests = max(batch_size, LEAST)
        begin = turn * requests % len(self.prompts)
        prompts = itertools.cycle(self.prompts[begin:] + self.prompts[:begin])
        alive: set[str] = set()

        def admit() -> None:
            request = f"{next(self.count)}"
            engine.add_request(request, {"prompt_token_ids": next(prompts)}, self.params)
            alive.add(request)

        started: set[str] = set()
        for _ in range(batch_size):
            admit()
        while len(started) < batch_size:
            for output in engine.step():
                started.add(output.request_id)
                if output.finished:
                    alive.discard(output.request_id)
                    admit()
        drafts, accepted = self.counters()
        tokens, goal, start = 0, requests * self.settings.max_tokens, time.perf_counter()
        while tokens < goal:
            for output in engine.step():
                tokens += len(output.outputs[0].token_ids)
                if output.finished:
                    alive.discard(output.request_id)
                    admit()
        seconds = time.perf_counter() - start
        drafts_now, accepted_now = self.counters()
        engine.abort_request(list(alive))
        while engine.has_unfinished_requests():
            engine.step()
        return Measurement(tokens, seconds, drafts_now - drafts, accepted_now - accepted)


def main(argv: list[str]) -> None:
    name, settings = argv
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    try:
        engine = SweepEngine(name, SweepSettings.from_json(Path(settings).read_text(encoding="utf-8")))
    except NotEnoughMemoryError as error:
        replies.write(json.dumps({"error": str(error)}) + "\n")
        return
    replies.write(json.dumps({"ready": name}) + "\n")
    replies.flush()
    for line in sys.stdin:
        replies.write(json.dumps(asdict(engine.run(*map(int, line.split())))) + "\n")
        replies.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
