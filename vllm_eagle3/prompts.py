"""Reads prompts from JSONL with user turns, ShareGPT-style conversations, or a Hugging Face data set."""

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

USER_ROLES = {"user", "human"}
SYSTEM_ROLES = {"system", "developer"}


@dataclass(frozen=True)
class Prompt:
    """One conversation: the user's turns, and the system prompt ("" for none).

    `source` is the data set or task that the row names.
    """

    id: str
    source: str
    turns: tuple[str, ...]
    system: str = ""


def system_prompt(row: dict[str, Any]) -> str:
    """The system prompt of `row`: its key `system`, or the system messages of its conversation; "" for none.

    Raises:
        ValueError: it is not a string.
    """
    chat = row.get("conversations", row.get("messages"))
    found = [row["system"]] if row.get("system") is not None else []
    if isinstance(chat, list):
        messages = [part for part in chat if isinstance(part, dict)]
        system = [part for part in messages if part.get("from", part.get("role")) in SYSTEM_ROLES]
        found += [part.get("value", part.get("content")) for part in system]
    if not all(isinstance(text, str) for text in found):
        raise ValueError("a system prompt is not a string")
    return "\n\n".join(found)


def prompt_id(source: str, turns: tuple[str, ...]) -> str:
    """An id for a row without one: the source and the first 12 hex digits of the SHA-1 of the turns."""
    return f"{source}-{hashlib.sha1(chr(0x1E).join(turns).encode()).hexdigest()[:12]}"


def user_turns(row: dict[str, Any]) -> tuple[str, ...]:
    """The user's turns of a row.

    A row has `turns`, ShareGPT `conversations` ({"from", "value"}), chat `messages` ({"role", "content"}), `prompt`, or
    `instruction` with an optional `input`.

    Raises:
        ValueError: the row has none of these, or no user turn that is a non-empty string.
    """
    if "turns" in row:
        turns = row["turns"]
    elif "conversations" in row or "messages" in row:
        chat = row.get("conversations", row.get("messages"))
        if not isinstance(chat, list) or not all(isinstance(part, dict) for part in chat):
            raise ValueError("the conversation is not a list of objects")
        turns = [
            part.get("value", part.get("content"))
            for part in chat
            if part.get("from", part.get("role")) in USER_ROLES
        ]
    elif "prompt" in row:
        turns = [row["prompt"]]
    elif "instruction" in row:
        turns = ["\n\n".join(text for text in (row["instruction"], row.get("input")) if text)]
    else:
        raise ValueError(
            "expected a key `turns`, `conversations`, `messages`, `prompt` or `instruction`, "
            f"found {sorted(row)}"
        )
    if not isinstance(turns, list) or not turns:
        raise ValueError("no user turn")
    if not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise ValueError("a user turn is empty or not a string")
    return tuple(turns)


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, object) for each row of a `.jsonl` or `.jsonl.gz` file, or of a `.json` file that holds a list.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is not valid JSON. The message names the file and the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such data file")
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        if path.name.removesuffix(".gz").endswith(".json"):
            try:
                rows = json.load(file)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: not valid JSON ({error})") from error
            if not isinstance(rows, list):
                raise ValueError(f"{path}: expected a list of rows, found {type(rows).__name__}")
            yield from ((f"{path}, row {i}", row) for i, row in enumerate(rows))
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not valid JSON ({error})") from error


def load_prompts(data: str | Path, sources: set[str] | None = None) -> list[Prompt]:
    """The prompts of `data`, which is a file or the name of a Hugging Face data set (its `train` split is read).

    With `sources`, only rows whose `source` (or `task`) is among them are kept.

    Raises:
        FileNotFoundError: `data` looks like a path and does not exist.
        ValueError: a row is malformed, one of `sources` does not occur, or no prompt is left.
    """
    path = Path(data)
    if path.is_file():
        rows: Iterator[tuple[str, Any]] = read_rows(path)
        default_source = path.name.split(".")[0]
    elif path.exists() or path.suffix in {".jsonl", ".json", ".gz"}:
        raise FileNotFoundError(f"{path}: expected a .jsonl, .jsonl.gz or .json file of prompts, found none")
    else:
        try:
            import datasets
        except ImportError as error:
            raise ValueError(
                f"{data}: no such file; to read it as a Hugging Face data set, install `datasets`"
            ) from error
        split = datasets.load_dataset(str(data), split="train")
        rows = ((f"{data}, row {i}", row) for i, row in enumerate(split))
        default_source = str(data)

    prompts, seen = [], set()
    for where, row in rows:
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object, found {type(row).__name__}")
        source = str(row.get("source", row.get("task", default_source)))
        seen.add(source)
        if sources is not None and source not in sources:
            continue
        try:
            turns, system = user_turns(row), system_prompt(row)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        name = str(row.get("id") or prompt_id(source, (system, *turns) if system else turns))
        prompts.append(Prompt(name, source, turns, system))
    if sources is not None and sources - seen:
        raise ValueError(f"{data}: no row has source {sorted(sources - seen)}; it has {sorted(seen)}")
    if not prompts:
        raise ValueError(f"{data}: no prompts")
    return prompts
