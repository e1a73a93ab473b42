"""Marks the parts of a text that came from accepted drafts: in colour, or in brackets without colour."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TextIO

Decode = Callable[[list[int]], str]
Marks = tuple[str, str]
COLOUR: Marks = ("\x1b[1;32m", "\x1b[0m")
BRACKETS: Marks = ("[", "]")
INCOMPLETE = "\ufffd"
"""What a tokenizer returns for the first bytes of an incomplete character."""


def marks_for(stream: TextIO) -> Marks:
    """Colour on a terminal, unless NO_COLOR is set (https://no-color.org); otherwise brackets."""
    return COLOUR if stream.isatty() and not os.environ.get("NO_COLOR") else BRACKETS


class AcceptedText:
    """Decodes the tokens of one answer, step by step, into parts that are accepted drafts or not.

    The last token of a step is the target's own; the tokens before it are accepted drafts.
    """

    def __init__(self, decode: Decode) -> None:
        self.decode = decode
        self.ids: list[int] = []
        self.shown = ""

    def step(self, tokens: list[int]) -> list[tuple[str, bool]]:
        """(text, whether it was accepted) of the next step's tokens."""
        parts: list[tuple[str, bool]] = []
        for place, token in enumerate(tokens):
            self.ids.append(token)
            text = self.decode(self.ids)
            if text.endswith(INCOMPLETE):
                continue
            new, self.shown, accepted = text[len(self.shown) :], text, place < len(tokens) - 1
            if parts and parts[-1][1] == accepted:
                parts[-1] = (parts[-1][0] + new, accepted)
            elif new:
                parts.append((new, accepted))
        return parts


def marked(parts: Iterable[tuple[str, bool]], marks: Marks) -> str:
    """The text of `parts` on one line, with the accepted ones between `marks`."""
    shown = ""
    for text, accepted in parts:
        # A leading space stays outside of the brackets, so that they are next to words.
        body = text.lstrip()
        space = text[: len(text) - len(body)]
        shown += space + (marks[0] + body + marks[1] if accepted and body else body)
    return shown


def wrapped(steps: Iterable[list[int]], decode: Decode, marks: Marks, width: int, lines: int) -> list[str]:
    """An answer in at most `lines` lines of `width` characters (without marks). Its line breaks become spaces."""
    text = AcceptedText(decode)
    cells = [
        (character, accepted) for step in steps for part, accepted in text.step(step) for character in part
    ]
    words: list[list[tuple[str, bool]]] = [[]]
    for character, accepted in cells:
        if character.isspace():
            words.append([])
        else:
            words[-1].append((character, accepted))
    rows: list[list[tuple[str, bool]]] = [[]]
    for word in filter(None, words):
        if rows[-1] and len(rows[-1]) + 1 + len(word) > width:
            rows.append([])
        # A space between two accepted words counts as accepted.
        between = [(" ", rows[-1][-1][1] and word[0][1])] if rows[-1] else []
        rows[-1] += between + word
    if len(rows) > lines:
        rows = rows[:lines]
        rows[-1].append((" ...", False))
    return [marked(_merged(row), marks) for row in rows]


def _merged(row: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Join adjacent parts of the same kind."""
    parts: list[tuple[str, bool]] = []
    for text, accepted in row:
        if parts and parts[-1][1] == accepted:
            parts[-1] = (parts[-1][0] + text, accepted)
        else:
            parts.append((text, accepted))
    return parts
