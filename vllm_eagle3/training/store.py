"""Features of the target on disk, in safetensors shards.

The shards are allocated at the start, memory-mapped, and filled as the features are computed."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_eagle3.training.data import Batch, Document, fingerprint
from vllm_eagle3.training.features import Features, Target

logger = logging.getLogger(__name__)
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
NUMPY = {2: np.uint16, 4: np.uint32}


class FeatureStore:
    """Features of a fixed list of documents.

    A shard holds "features" [tokens, (n_aux + 1) * ht]: aux states, then last.

    `features(batch, documents)` reads the features that are stored, and computes and stores the others: the first
    epoch fills the store, and later epochs read it. A store belongs to one target, one choice of layers and one set
    of documents. Several processes of a host may share it after one of them has made it: a document is marked as done
    after its rows are written, and if two processes compute the same document, the rows of either are valid.
    """

    def __init__(
        self, path: str | Path, target: Target, documents: Sequence[Document], shard_tokens: int = 1 << 18
    ):
        """Raises ValueError for a store of other data or settings, and OSError if the disk has too little room."""
        self.path, self.target = Path(path), target
        self.dtype = target.head.weight.dtype
        self.parts = len(target.aux_layers) + 1
        self.hidden = target.head.weight.shape[1]
        lengths = [len(d.tokens) for d in documents]
        self.shards, self.where = self._assign(lengths, shard_tokens)
        meta = {
            "target": target.path,
            "aux_layers": list(target.aux_layers),
            "dtype": str(self.dtype),
            "documents": len(documents),
            "tokens": sum(lengths),
            "shard_tokens": shard_tokens,
            "data_sha1": fingerprint(documents),
        }
        self.lengths = lengths
        self.size = sum(lengths) * self.parts * self.hidden * self.dtype.itemsize
        self._open(meta)
        self.done = np.memmap(self.path / "done.bin", dtype=np.uint8, mode="r+", shape=(len(documents),))
        self.maps = [self._map(i, n) for i, n in enumerate(self.shards)]

    @staticmethod
    def _assign(lengths: Sequence[int], shard_tokens: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Shard sizes in tokens, and (shard, first row) of each document."""
        shards, where = [0], []
        for n in lengths:
            if shards[-1] and shards[-1] + n > shard_tokens:
                shards.append(0)
            where.append((len(shards) - 1, shards[-1]))
            shards[-1] += n
        return shards, where

    def _shard(self, index: int) -> Path:
        return self.path / f"features-{index:05d}.safetensors"

    def _header(self, tokens: int) -> bytes:
        width = self.parts * self.hidden
        entry = {
            "dtype": DTYPES[self.dtype],
            "shape": [tokens, width],
            "data_offsets": [0, tokens * width * self.dtype.itemsize],
        }
        text = json.dumps({"features": entry}).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def _open(self, meta: dict[str, Any]) -> None:
        """Check an existing store against `meta`, or log the size of a new one and allocate it."""
        index = self.path / "index.json"
        if index.is_file():
            found = json.loads(index.read_text())
            wrong = [f"{k}: {found.get(k)!r} instead of {v!r}" for k, v in meta.items() if found.get(k) != v]
            if wrong:
                raise ValueError(
                    f"{index}: the store was made for other data or settings ({'; '.join(wrong)})"
                )
            return
        self.path.mkdir(parents=True, exist_ok=True)
        size = self.size
        free = shutil.disk_usage(self.path).free
        text = f"{meta['tokens']:,} tokens x {self.parts} states x {self.hidden} = {size / 1e9:.2f} GB"
        if size > 0.95 * free:
            raise OSError(f"{self.path}: features need {text}, but the disk has {free / 1e9:.2f} GB free")
        logger.warning("features will take %s in %s (%.2f GB free)", text, self.path, free / 1e9)
        for i, tokens in enumerate(self.shards):
            header = self._header(tokens)
            with self._shard(i).open("wb") as out:
                out.write(header)
                out.truncate(len(header) + tokens * self.parts * self.hidden * self.dtype.itemsize)
        (self.path / "done.bin").write_bytes(bytes(meta["documents"]))
        index.write_text(json.dumps(meta, indent=2) + "\n")

    def _map(self, index: int, tokens: int) -> np.memmap:
        offset = len(self._header(tokens))
        shape = (tokens, self.parts * self.hidden)
        return np.memmap(
            self._shard(index), dtype=NUMPY[self.dtype.itemsize], mode="r+", offset=offset, shape=shape
        )

    def _rows(self, document: int) -> np.ndarray:
        shard, first = self.where[document]
        return self.maps[shard][first : first + self.lengths[document]]

    def features(self, batch: Batch, documents: Sequence[int]) -> Features:
        """Features of a packed batch of `documents` (indices into the store's list), in that order."""
        if all(self.done[i] for i in documents):
            bits = torch.from_numpy(np.concatenate([self._rows(i) for i in documents]))
            *aux, last = bits.view(self.dtype).to(self.target.device).split(self.hidden, dim=1)
            return Features(aux, last)
        features = self.target.features(batch)
        integer = torch.uint16 if self.dtype.itemsize == 2 else torch.uint32
        bits = torch.cat([*features.aux, features.last], dim=1).cpu().view(integer)
        start = 0
        for i in documents:
            self._rows(i)[:] = bits[start : start + self.lengths[i]].numpy()
            self.done[i] = 1
            start += self.lengths[i]
        return features
