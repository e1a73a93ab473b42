"""Runs one mode of an evaluation in its own process: `python -m vllm_eagle3.evaluation.worker MODE SETTINGS OUT`.

SETTINGS is a JSON file (EvalSettings). OUT gets one JSON line per task (TaskRun), or {"error": message} if the engine
finds too little memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from vllm_eagle3.evaluation.engines import Engine, ReferenceEngine, VllmEngine
from vllm_eagle3.evaluation.metrics import TaskRun
from vllm_eagle3.evaluation.settings import EvalSettings, load_tasks
from vllm_eagle3.prompts import Prompt
from vllm_eagle3.runner.engine_memory import NotEnoughMemoryError


def run_task(engine: Engine, mode: str, task: str, prompts: list[Prompt], settings: EvalSettings) -> TaskRun:
    """Answer all turns. The first turns of all conversations are one batch, then the second turns, and so on.

    Raises ValueError if a turn leaves no room for an answer.
    """
    run = TaskRun(mode, task)
    chats: dict[str, list[dict[str, str]]] = {prompt.id: [] for prompt in prompts}
    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        asked = [prompt for prompt in prompts if len(prompt.turns) > turn]
        inputs = []
        for prompt in asked:
            chats[prompt.id].append({"role": "user", "content": prompt.turns[turn]})
            ids = engine.tokenizer.apply_chat_template(
                chats[prompt.id], add_generation_prompt=True, return_dict=False
            )
            if len(ids) + settings.max_tokens > settings.max_model_len:
                raise ValueError(
                    f"{prompt.id}, turn {turn + 1}: {len(ids)} tokens and {settings.max_tokens} new ones "
                    f"are more than --max-model-len {settings.max_model_len}"
                )
            inputs.append(ids)
        answers = engine.answer(inputs, run, f"{mode} {task} turn {turn + 1}")
        for prompt, (tokens, text) in zip(asked, answers, strict=True):
            run.answers.setdefault(prompt.id, []).append(tokens)
            chats[prompt.id].append({"role": "assistant", "content": text})
    return run


def run_mode(mode: str, settings: EvalSettings) -> Iterator[TaskRun]:
    """Run `mode` on each task."""
    make: Callable[[str, EvalSettings], Engine] = (
        ReferenceEngine if mode.startswith("reference-") else VllmEngine
    )
    engine = make(mode, settings)
    for task, prompts in load_tasks(settings).items():
        yield run_task(engine, mode, task, prompts, settings)


def main(argv: list[str]) -> None:
    mode, settings, out = argv
    with Path(out).open("w", encoding="utf-8") as file:
        try:
            for run in run_mode(mode, EvalSettings.from_json(Path(settings).read_text(encoding="utf-8"))):
                file.write(json.dumps(run.to_json()) + "\n")
                file.flush()
        except NotEnoughMemoryError as error:
            file.write(json.dumps({"error": str(error)}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
