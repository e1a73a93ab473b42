"""One engine of a sweep in its own process: `python -m vllm_eagle3.evaluation.sweep.worker NAME SETTINGS`.

Reads a command a line from stdin and replies in lines on what was stdout, all of them JSON objects; whatever else
writes to stdout goes to stderr. An engine that finds too little memory replies {"error": message} and ends.

    {"measure": [batch size, turn]}   {"tokens": ...}, a Measurement
    {"answer": null}                  {"answer": ...} for each prompt, as they finish; then {"end": counts}
    {"chat": [messages]}              {"step": [token ids]} for each step of the target; then {"end": counts}
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
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
    options |= settings.options
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
        self.count = itertools.count()

    @cached_property
    def prompts(self) -> list[list[int]]:
        """The token ids of the prompts that leave room for an answer. Raises ValueError if there is none."""
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

    def generate(self, prompts: list[list[int]]) -> Iterator[tuple[int, list[int], bool]]:
        """(index of the prompt, new tokens, whether it is finished), in the order in which tokens come.

        The new tokens of one step are the accepted drafts and, last, the token that the target added.
        """
        from vllm.inputs import tokens_input

        engine: Any = self.llm.llm_engine
        places = {f"{next(self.count)}": place for place, _ in enumerate(prompts)}
        for request, place in places.items():
            engine.add_request(request, tokens_input(prompts[place]), self.params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                yield places[output.request_id], list(output.outputs[0].token_ids), output.finished

    def answers(self) -> Iterator[dict[str, Any]]:
        """Every prompt's answer as it finishes, as the token ids of each step; then what was counted."""
        before = self.counters()
        steps: list[list[list[int]]] = [[] for _ in self.prompts]
        for place, tokens, finished in self.generate(self.prompts):
            if tokens:
                steps[place].append(tokens)
            if finished:
                yield {"answer": {"prompt": place, "steps": steps[place]}}
        yield {"end": self.since(before)}

    def chat(self, messages: list[dict[str, str]]) -> Iterator[dict[str, Any]]:
        """The steps of the next message of a conversation; then what was counted.

        The oldest messages are left out where the conversation no longer fits.
        """
        tokenizer: Any = self.llm.get_tokenizer()
        room = self.settings.max_model_len - self.settings.max_tokens
        while True:
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            if len(ids) <= room or len(messages) == 1:
                break
            messages = messages[2:]  # a question and its answer
        before, times, made = self.counters(), list[float](), list[int]()
        for _, tokens, _ in self.generate([ids[-room:]]):
            if tokens:
                times.append(time.perf_counter())
                made.append(len(tokens))
                yield {"step": tokens}
        # As everywhere, the clock starts with the first token.
        timed = {"decode_tokens": sum(made[1:]), "seconds": times[-1] - times[0]}
        yield {"end": self.since(before) | timed}

    def since(self, before: tuple[int, int, list[int]]) -> dict[str, Any]:
        """What was counted since `before`, as the fields of a TaskRun."""
        verifications, accepted, positions = self.counters()
        return {
            "verifications": verifications - before[0],
            "accepted": accepted - before[1],
            "accepted_per_position": [now - then for now, then in zip(positions, before[2], strict=True)],
        }

    def counters(self) -> tuple[int, int, list[int]]:
        """Verifications, accepted drafts, and these by position, since the engine started."""
        found = {metric.name: metric for metric in self.llm.get_metrics()}
        drafts, accepted, positions = (
            found.get(f"vllm:spec_decode_num_{name}")
            for name in ("drafts", "accepted_tokens", "accepted_tokens_per_pos")
        )
        values = [int(getattr(metric, "value", 0)) for metric in (drafts, accepted)]
        return values[0], values[1], [int(count) for count in getattr(positions, "values", [])]

    def run(self, batch_size: int, turn: int) -> Measurement:
        """Measure one run. As soon as a request finishes, the next prompt replaces it.

        The clock starts when all first requests have been admitted. It stops after `max_tokens` tokens for each of the
        `batch_size` requests, or for LEAST prompts if these are more. Run number `turn` begins in the list of prompts
        where the run before it ended, so that all engines see the same prompts in the same turn.
        """
        from vllm.inputs import tokens_input

        engine: Any = self.llm.llm_engine
        requests = max(batch_size, LEAST)
        begin = turn * requests % len(self.prompts)
        prompts = itertools.cycle(self.prompts[begin:] + self.prompts[:begin])
        alive: set[str] = set()

        def admit() -> None:
            request = f"{next(self.count)}"
            engine.add_request(request, tokens_input(next(prompts)), self.params)
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
        drafts, accepted, _ = self.counters()
        tokens, goal, start = 0, requests * self.settings.max_tokens, time.perf_counter()
        while tokens < goal:
            for output in engine.step():
                tokens += len(output.outputs[0].token_ids)
                if output.finished:
                    alive.discard(output.request_id)
                    admit()
        seconds = time.perf_counter() - start
        drafts_now, accepted_now, _ = self.counters()
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
        for reply in obey(engine, json.loads(line)):
            replies.write(json.dumps(reply) + "\n")
            replies.flush()


def obey(engine: SweepEngine, command: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The replies to one command, see above."""
    if "measure" in command:
        yield asdict(engine.run(*command["measure"]))
    elif "chat" in command:
        yield from engine.chat(command["chat"])
    else:
        yield from engine.answers()


if __name__ == "__main__":
    main(sys.argv[1:])
