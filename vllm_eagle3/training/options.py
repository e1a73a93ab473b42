"""Options that are described once, in a dataclass field. The command line and recipes are made from these fields."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def option(default: Any, text: str, **more: Any) -> Any:
    """A dataclass field that is an option. `text` is its help.

    `more` may hold `flag` (the option's name if it is not the field's), `choices` and `metavar`.
    """
    return dataclasses.field(default=default, metadata={"help": text, **more})


def flag_of(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("flag", field.name))


def option_fields(cls: type[Any]) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    """Fields of `cls` that are options, with their resolved types."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if "help" in field.metadata:
            yield field, hints[field.name]


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        message = f"expected whole numbers with commas between them, found {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def add_options(parser: argparse._ActionsContainer, cls: type[Any]) -> None:
    """Add one argument for each option of `cls`. Options that are not given are not in the parsed namespace."""
    for field, hint in option_fields(cls):
        text, default = field.metadata["help"], field.default
        more: dict[str, Any] = {k: field.metadata[k] for k in ("choices", "metavar") if k in field.metadata}
        kind = _kind(hint)
        if kind is bool:
            more["action"] = "store_true"
        elif kind == tuple[int, ...]:
            more |= {"type": numbers, "metavar": "N,N,N"}
        elif typing.get_origin(kind) is tuple:
            more |= {"nargs": "+", "type": typing.get_args(kind)[0]}
        else:
            more["type"] = kind
        shown = default in (None, False, (), dataclasses.MISSING) or "default" in text
        parser.add_argument(
            "--" + flag_of(field).replace("_", "-"),
            dest=flag_of(field),
            default=argparse.SUPPRESS,
            help=text if shown else f"{text} (default: {default})",
            **more,
        )


def options_of(*classes: type[Any]) -> set[str]:
    """Names of the options of `classes`, in the form that recipes use."""
    return {flag_of(field) for cls in classes for field, _ in option_fields(cls)}


def from_table(cls: type[Any], table: Mapping[str, Any], where: str, **more: Any) -> Any:
    """An instance of `cls` with the options in `table` (of a recipe or the command line), and `more` for other fields.

    Keys of `table` that are not options of `cls` are ignored. Raises ValueError, which begins with `where`, for a
    value of another type or one that is not among the choices.
    """
    given: dict[str, Any] = {}
    for field, hint in option_fields(cls):
        key = flag_of(field)
        if key not in table:
            continue
        given[field.name] = _typed(table[key], _kind(hint), f"{where}: {key}")
        choices = field.metadata.get("choices")
        if choices and table[key] not in choices:
            raise ValueError(f"{where}: {key}: expected one of {', '.join(choices)}, found {table[key]!r}")
    return cls(**given | more)


def _kind(hint: Any) -> Any:
    """The type of an option without `| None`."""
    if isinstance(hint, types.UnionType):
        return next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    return hint


def _typed(value: Any, kind: Any, where: str) -> Any:
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where}: expected a list, found {value!r}")
        return tuple(_typed(part, typing.get_args(kind)[0], where) for part in value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{where}: expected {kind.__name__}, found {value!r}")
    return value
