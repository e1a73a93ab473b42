"""`vllm-eagle3 inspect DIR [--target DIR]`: print what vLLM will load from a checkpoint."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_eagle3.checkpoint.files import Checkpoint, read_checkpoint
from vllm_eagle3.checkpoint.tensors import refuse_another_model

SHOWN = (
    "hidden_size",
    "target_hidden_size",
    "vocab_size",
    "draft_vocab_size",
    "max_position_embeddings",
    "norm_before_residual",
    "norm_before_fc",
    "fc_norm",
    "norm_output",
    "tie_word_embeddings",
)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """The canonical form as JSON: files, config, notes, tensors with shape and dtype. Reads every tensor.

    Raises:
        CheckpointError: as `Checkpoint.tensors`.
    """
    refuse_another_model(checkpoint.config, checkpoint.file_of, str(checkpoint.path))
    notes = list(checkpoint.config.notes)
    tensors = {}
    if not checkpoint.config.unsupported_reason:
        for name, tensor in checkpoint.tensors(notes):
            tensors[name] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    config = dataclasses.asdict(checkpoint.config)
    del config["notes"]
    return {
        "path": str(checkpoint.path),
        "files": [file.name for file in checkpoint.files],
        "config": config,
        "notes": notes,
        "tensors": tensors,
    }


def inspect(
    path: str | Path, target: str | Path | Mapping[str, Any] | None = None, aux_layers: Any = None
) -> str:
    """The canonical form of the draft at `path`. Arguments and errors are those of `read_checkpoint`."""
    return _render(describe(read_checkpoint(path, target, aux_layers)))


def add_parser(subparsers: Any) -> None:
    """Add the command `inspect`; its `func(args)` returns the exit code."""
    parser = subparsers.add_parser("inspect", help="print the canonical form of an EAGLE-3 checkpoint")
    parser.add_argument("path", metavar="DIR", help="directory of the draft")
    parser.add_argument("--target", metavar="DIR", help="directory of the target, to check the draft against")
    parser.add_argument(
        "--aux-layers", type=int, nargs="+", metavar="K", help="override the aux layers (ids: after k layers)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Print the canonical form and return 0. Raises CheckpointError."""
    form = describe(read_checkpoint(args.path, args.target, args.aux_layers))
    sys.stdout.write(json.dumps(form, indent=2) + "\n" if args.json else _render(form))
    return 0


def _render(form: dict[str, Any]) -> str:
    config = form["config"]
    served_by = "stock vLLM" if config["unsupported_reason"] else "vllm-eagle3"
    lines = [f"{form['path']}: EAGLE-3 draft, {config['dialect']} dialect, served by {served_by}"]
    lines += ["", "notes", *(f"  {note}" for note in form["notes"])]
    if not config["unsupported_reason"]:
        aux = config["aux_layers"]
        shown = "unknown: name the target" if aux is None else list(aux)
        lines += ["", "config", f"  {'aux_layers':<24} {shown}"]
        lines += [f"  {key:<24} {json.dumps(config[key])}" for key in SHOWN]
        lines += [
            "",
            "layer",
            *(f"  {key:<24} {json.dumps(value)}" for key, value in config["layer_config"].items()),
        ]
        lines += ["", f"tensors ({', '.join(form['files'])})"]
        lines += [f"  {name:<44} {t['dtype']:<9} {t['shape']}" for name, t in form["tensors"].items()]
    return "\n".join(lines) + "\n"
