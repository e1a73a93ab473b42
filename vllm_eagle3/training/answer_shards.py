"""The target's answers on disk: shards `part-00000.jsonl.gz`.

Each row is one answer and everything that the model read before it, in the order of the conversation:
    {"id", "source", "turn", "sample", "temperature",
     "prompt_token_ids", "response_token_ids", "finish_reason"}
The loss mask is 0 on `prompt_token_ids` and 1 on `response_token_ids`.
"""

import gzip
import json
from pathlib import Path
from typing import Any

from vllm_eagle3.prompts import read_rows

Row = dict[str, Any]


class ShardWriter:
    """Writes rows to numbered shards in the directory `out`, each in one atomic step.

    Of `parts` processes that write to the same directory, number `part` takes the shard numbers with that
    remainder, so that two processes never write the same file.
    """

    def __init__(self, out: Path, shard_rows: int, part: int = 0, parts: int = 1) -> None:
        self.out, self.shard_rows, self.rows = out, shard_rows, list[Row]()
        out.mkdir(parents=True, exist_ok=True)
        last = max((int(p.name[5:10]) for p in shards(out)), default=-1)
        self.step, self.next = parts, last + 1 + (part - last - 1) % parts

    def add(self, rows: list[Row]) -> None:
        self.rows += rows
        if len(self.rows) >= self.shard_rows:
            self.flush()

    def flush(self) -> None:
        if not self.rows:
            return
        path = self.out / f"part-{self.next:05d}.jsonl.gz"
        temporary = path.with_suffix(".tmp")
        with gzip.open(temporary, "wt", encoding="utf-8", compresslevel=6) as file:
            file.writelines(json.dumps(row, separators=(",", ":")) + "\n" for row in self.rows)
        temporary.replace(path)
        self.rows, self.next = [], self.next + self.step


def shards(out: Path) -> list[Path]:
    """The shards in the directory `out`, in order."""
    return sorted(out.glob("part-[0-9][0-9][0-9][0-9][0-9].jsonl.gz"))


def done_keys(files: list[Path]) -> set[tuple[str, int]]:
    """(id, sample) of the conversations in `files`. All rows of a conversation are in one shard."""
    return {(row["id"], row.get("sample", 0)) for path in files for _, row in read_rows(path)}
