"""Let the target answer prompts: the text that a draft is trained on, as token ids (`answer_shards` writes it).

A run that was killed is resumed by the same command; at most one shard of answers is lost.
"""

import argparse
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from vllm_eagle3.log_files import quiet, redirect_output
from vllm_eagle3.prompts import Prompt, load_prompts
from vllm_eagle3.training.answer_shards import Row, ShardWriter, done_keys, shards

logger = logging.getLogger(__name__)
MIN_ROOM = 16  # tokens: a prompt that leaves less room than this for its answer is skipped


@dataclass(frozen=True)
class GenerateSettings:
    """Which prompts are answered, and how. Prompts, and samples of a prompt, take the `temperatures` in turn."""

    target: str
    data: tuple[str, ...]
    out: Path
    sources: frozenset[str] | None = None
    exclude: tuple[str, ...] = ()
    skip_last: int = 0
    limit: int | None = None
    temperatures: tuple[float, ...] = (0.0, 1.0)
    samples: int = 1
    max_tokens: int = 1024
    max_model_len: int = 4096
    max_num_seqs: int = 128
    shard_rows: int = 256
    part: int = 0  # this process answers the conversations part, part + parts, part + 2 * parts, ...
    parts: int = 1
    dtype: Any = "bfloat16"  # as vLLM's
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        for name in ("samples", "max_tokens", "max_model_len", "max_num_seqs", "shard_rows", "parts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, found {getattr(self, name)}")
        if not self.temperatures or any(t < 0 for t in self.temperatures):
            raise ValueError(f"temperatures: expected one or more values >= 0, found {self.temperatures}")
        if self.skip_last < 0 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"expected skip_last >= 0, limit >= 1; found {self.skip_last}, {self.limit}")


@dataclass
class Conversation:
    """A prompt that is being answered: the messages so far, and one row for each answered turn."""

    prompt: Prompt
    sample: int
    temperature: float
    messages: list[dict[str, str]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.prompt.system:
            self.messages.append({"role": "system", "content": self.prompt.system})

    @property
    def key(self) -> tuple[str, int]:
        return self.prompt.id, self.sample


def conversations(settings: GenerateSettings) -> list[Conversation]:
    """The conversations still to be answered: all prompts x samples without the excluded and the answered ones.

    A prompt's place in the data decides its temperatures, so that a resumed run chooses the same ones.
    """
    prompts = [p for data in settings.data for p in load_prompts(data)]
    prompts = prompts[: len(prompts) - settings.skip_last]
    if settings.sources is not None:
        unknown = settings.sources - {p.source for p in prompts}
        if unknown:
            raise ValueError(f"--sources: {sorted(unknown)} not found in {list(settings.data)}")
        prompts = [p for p in prompts if p.source in settings.sources]
    excluded = {id for id, _ in done_keys([Path(path) for path in settings.exclude])}
    done = done_keys(shards(settings.out))
    todo = [
        Conversation(p, s, settings.temperatures[(i + s) % len(settings.temperatures)])
        for s in range(settings.samples)
        for i, p in enumerate(prompts)
        if p.id not in excluded
    ]
    if settings.limit is not None:
        todo = todo[: settings.limit]
    return [c for c in todo[settings.part :: settings.parts] if c.key not in done]


def answer(llm: Any, todo: list[Conversation], settings: GenerateSettings) -> Iterator[Conversation]:
    """Yield each conversation as soon as its last turn is answered, while the engine's batch stays full."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input

    engine, tokenizer = llm.llm_engine, llm.get_tokenizer()
    running: dict[str, Conversation] = {}
    waiting = iter(todo)

    def ask(conversation: Conversation) -> bool:
        """Send the next turn to the engine. Returns False if no turn is left, or no room for an answer."""
        turn = len(conversation.rows)
        if turn == len(conversation.prompt.turns):
            return False
        messages = [*conversation.messages, {"role": "user", "content": conversation.prompt.turns[turn]}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        room = settings.max_model_len - len(ids)
        if room < MIN_ROOM:
            return False
        conversation.messages = messages
        max_tokens = min(settings.max_tokens, room)
        params = SamplingParams(temperature=conversation.temperature, max_tokens=max_tokens)
        request_id = f"{conversation.sample}/{turn}/{conversation.prompt.id}"
        engine.add_request(request_id, tokens_input(ids), params)
        running[request_id] = conversation
        return True

    while True:
        # The engine holds a second batch in waiting: it fills each place as soon as a request finishes.
        while len(running) < 2 * settings.max_num_seqs and (new := next(waiting, None)) is not None:
            if not ask(new):
                yield new
        if not running:
            return
        for output in engine.step():
            if not output.finished:
                continue
            conversation, completion = running.pop(output.request_id), output.outputs[0]
            conversation.rows.append(
                {
                    "id": conversation.prompt.id,
                    "source": conversation.prompt.source,
                    "turn": len(conversation.rows),
                    "sample": conversation.sample,
                    "temperature": conversation.temperature,
                    "prompt_token_ids": list(output.prompt_token_ids),
                    "response_token_ids": list(completion.token_ids),
                    "finish_reason": completion.finish_reason,
                }
            )
            conversation.messages.append({"role": "assistant", "content": completion.text})
            if not ask(conversation):
                yield conversation


def generate(settings: GenerateSettings, console: TextIO | None = None) -> int:
    """Write the missing answers to shards in `settings.out`. Returns the number of generated tokens.

    Args:
        settings: what to answer, and how.
        console: for the progress (default: stderr).

    Raises:
        ValueError: bad prompts or settings.
    """
    todo = conversations(settings)
    if not todo:
        logger.info("%s: all prompts are answered", settings.out)
        return 0
    from vllm import LLM

    from vllm_eagle3.runner.engine_memory import memory_arguments

    llm = LLM(
        settings.target,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        max_num_seqs=settings.max_num_seqs,
        enforce_eager=settings.enforce_eager,
        **memory_arguments(
            settings.target,
            None,
            batch_size=settings.max_num_seqs,
            max_model_len=settings.max_model_len,
            dtype=settings.dtype,
            least=1,  # few answers reach the greatest length
        ),
    )
    writer = ShardWriter(settings.out, settings.shard_rows, settings.part, settings.parts)
    tokens, skipped = 0, 0
    progress = tqdm(
        total=len(todo), unit="conversation", desc=settings.out.name, smoothing=0.05, file=console
    )
    try:
        for conversation in answer(llm, todo, settings):
            writer.add(conversation.rows)
            skipped += not conversation.rows
            tokens += sum(len(row["response_token_ids"]) for row in conversation.rows)
            seconds = progress.format_dict["elapsed"]
            rate = tokens / max(seconds, 1e-9)
            progress.set_postfix_str(f"{tokens} tokens, {rate:.0f} tokens/s", refresh=False)
            progress.update()
    finally:
        writer.flush()
        progress.close()
    if skipped:
        logger.warning(
            "%d of %d prompts skipped: they leave less than %d tokens for an answer within max_model_len %d",
            skipped,
            len(todo),
            MIN_ROOM,
            settings.max_model_len,
        )
    return tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", required=True, help="directory or name of the target model")
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        help="prompts: .jsonl or .json (.gz) with `turns`, `conversations` or `messages`, "
        "or a data set's name",
    )
    parser.add_argument(
        "--out", required=True, type=Path, help="directory of the shards; a run that stopped early is resumed"
    )
    parser.add_argument("--sources", help="only prompts of these sources, separated by commas")
    parser.add_argument(
        "--exclude", nargs="*", default=[], metavar="FILE", help="skip the prompts that these files answer"
    )
    parser.add_argument("--skip-last", type=int, default=0, help="leave out the last N prompts (validation)")
    parser.add_argument("--limit", type=int, help="at most this many conversations")
    parser.add_argument("--temperatures", default="0,1", help="taken in turn; default: %(default)s")
    for name, text in (
        ("samples", "answers per prompt"),
        ("max_tokens", "new tokens per answer"),
        ("max_model_len", "prompt and answer, tokens"),
        ("max_num_seqs", "answers at a time"),
        ("shard_rows", "rows per file"),
        ("part", "number of this process among those that share the prompts, from 0"),
        ("parts", "number of processes that share the prompts"),
    ):
        default = getattr(GenerateSettings, name)
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--enforce-eager", action="store_true", help="no torch.compile: starts sooner")
    parser.add_argument("--log", type=Path, metavar="FILE", help="for what vLLM and other libraries write")


def settings_from(arguments: argparse.Namespace) -> GenerateSettings:
    values = {name: getattr(arguments, name) for name in GenerateSettings.__dataclass_fields__}
    return GenerateSettings(
        **values
        | {
            "data": tuple(arguments.data),
            "exclude": tuple(arguments.exclude),
            "sources": frozenset(arguments.sources.split(",")) if arguments.sources else None,
            "temperatures": tuple(float(t) for t in arguments.temperatures.split(",")),
        }
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vllm_eagle3.training.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.log:
        console = redirect_output(arguments.log)
        with quiet(arguments.log, console):
            generate(settings_from(arguments), console)
    else:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
        generate(settings_from(arguments))


if __name__ == "__main__":
    main()
