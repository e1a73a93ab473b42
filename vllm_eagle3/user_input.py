"""Checks of the command line's arguments before any work begins. All of them raise UserError."""

import importlib.util
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class UserError(ValueError):
    """A user's mistake. The message names the option, what was expected and what was found."""


def check_model(model: str, option: str) -> None:
    """Refuse a `model` that looks like a path but is not a model's directory.

    Anything else may be a name on a model hub. The library that loads the model checks those.
    """
    path = Path(model).expanduser()
    if not (path.exists() or path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1):
        return
    if not (path / "config.json").is_file():
        found = "no such path" if not path.exists() else "no config.json there"
        raise UserError(f"{option}: expected the directory of a model, found {model} ({found})")


def check_files(paths: Iterable[str | Path], option: str) -> None:
    """Refuse paths that are not files."""
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"{option}: expected a file, found none at {path}")


def check_output_file(path: Path | None, option: str) -> None:
    """Refuse an output file that cannot be written."""
    if path is None:
        return
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UserError(f"{option}: expected a file in a folder that exists, found {path}")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"{option}: expected a file that may be written, found {path}")


def check_output_folder(path: Path, option: str) -> None:
    """Refuse an output folder that can neither be written nor created."""
    existing = path.resolve()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{option}: expected a folder that may be written, found {path}")


def read_json_object(path: Path, option: str) -> dict[str, Any]:
    """The JSON object in a file."""
    check_files([path], option)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{option}: expected JSON in {path}, found none ({error})") from error
    if not isinstance(found, dict):
        raise UserError(f"{option}: expected a JSON object in {path}, found {type(found).__name__}")
    return found


def require_packages(packages: Iterable[str], purpose: str, extra: str) -> None:
    """Raise UserError if optional packages are missing.

    Args:
        packages: the packages' import names.
        purpose: what needs them, for the message.
        extra: the extra of this project that installs them.
    """
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(
            f"{purpose} needs {', '.join(missing)}, which is not installed: pip install 'vllm-eagle3[{extra}]'"
        )
