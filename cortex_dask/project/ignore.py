"""The rules of a ``.cortexignore`` file, which are git's.

``pathspec`` translates the patterns. What is decided here is how they apply to a folder on the way down: the last
pattern that names an entry *itself* decides, and what lies in an excluded folder is never looked at, so it cannot be
re-included. That is how ``git check-ignore`` decides, and a test compares the two. Like git, patterns and paths are
compared byte by byte: ``?`` stands for one byte.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

from pathspec import GitIgnoreSpec

#: The name of the file at the project's root.
IGNORE_FILE = ".cortexignore"

#: The group in pathspec's expressions that holds the slash after a matched folder's name.
_FOLDER_SLASH = "ps_d"

#: A set of characters in which a named class stands, and the classes as ranges: git knows them, pathspec does not.
_SET_WITH_CLASS = re.compile(r"\[[!^]?\]?(?:[^][]|\[:[a-z]+:\])*\[:[a-z]+:\](?:[^][]|\[:[a-z]+:\])*\]")
_CLASSES = {
    "alnum": "a-zA-Z0-9",
    "alpha": "a-zA-Z",
    "blank": " \t",
    "cntrl": "\x00-\x1f\x7f",
    "digit": "0-9",
    "graph": "!-~",
    "lower": "a-z",
    "print": " -~",
    "punct": r"!-/:-@\[-`{-~",
    "space": " \t\n\v\f\r",
    "upper": "A-Z",
    "xdigit": "0-9A-Fa-f",
}


@dataclass(frozen=True, slots=True)
class Pattern:
    """A line of the file that says something, as it is shown to the user."""

    line: int
    text: str

    def __str__(self) -> str:
        return f"{IGNORE_FILE}:{self.line}: {self.text}"


class IgnoreRules:
    """The patterns of one ignore file.

    Parameters
    ----------
    data : bytes
        The file's content.

    Attributes
    ----------
    unusable : list of Pattern
        Lines that are no valid pattern; like git, the rules skip them.
    """

    def __init__(self, data: bytes = b"") -> None:
        self.unusable: list[Pattern] = []
        self._rules: list[tuple[Pattern, bool, re.Pattern[str]]] = []
        for number, line in _lines(data):
            shown = Pattern(number, line.decode("utf-8", "replace"))
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # Python's remarks on sets of characters that git takes as they are
                    translated = GitIgnoreSpec.from_lines([_prepare(line.decode("latin-1"))]).patterns
            except (ValueError, re.error):
                self.unusable.append(shown)
                continue
            for pattern in translated:
                expression = getattr(pattern, "regex", None)
                if pattern.include is None or expression is None:
                    self.unusable.append(shown)
                else:
                    self._rules.append((shown, pattern.include, expression))

    def excluding(self, path: str, *, folder: bool) -> Pattern | None:
        """Return the pattern that excludes an entry, or None if it stays.

        Parameters
        ----------
        path : str
            The entry's path relative to the project, with ``/``. Its parent folder must not be excluded itself.
        folder : bool
            Whether it is a folder; a link to a folder is none.
        """
        name = os.fsencode(path).decode("latin-1")
        for shown, excludes, expression in reversed(self._rules):
            if _names(expression, name, folder):
                return shown if excludes else None
        return None


def _lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the numbered lines that say something, split as git does: at line feeds only."""
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        line = raw.removesuffix(b"\r")
        # Trailing spaces count only when the last one left is escaped.
        while line.endswith(b" ") and not _escaped(line[:-1]):
            line = line[:-1]
        if line.removeprefix(b"!") not in (b"", b"/") and not line.startswith(b"#"):
            yield number, line


def _escaped(before: bytes | str) -> bool:
    """Tell whether an odd number of backslashes stands at the end."""
    mark = b"\\" if isinstance(before, bytes) else "\\"
    return (len(before) - len(before.rstrip(mark))) % 2 == 1  # type: ignore[arg-type]  # same type as ``before``


def _prepare(text: str) -> str:
    """Write a pattern so that pathspec reads it as git does."""
    text = re.sub(r"(?<![^/])\*{3,}(?![^/])", "**", text)  # git takes three stars and more for two
    text = re.sub(r"(?<!\\)((?:\\\\)*)\\/", r"\1/", text)  # an escaped slash is a slash
    text = re.sub(r"/\*\*/$", "/**/*/", text)  # the folders below, not the folder itself
    text = _SET_WITH_CLASS.sub(lambda match: re.sub(r"\[:([a-z]+):\]", _class, match[0]), text)
    if text[-1].isspace():  # pathspec would strip it; in a set of one it stays
        text = (text[:-2] if _escaped(text[:-1]) else text[:-1]) + f"[{text[-1]}]"
    return text


def _class(match: re.Match[str]) -> str:
    return _CLASSES.get(match[1], match[0])


def _names(expression: re.Pattern[str], path: str, folder: bool) -> bool:
    """Tell whether an expression matches the entry itself, and not only because it matches a folder above it."""
    text = f"{path}/" if folder else path
    for match in expression.finditer(text):
        if match.groupdict().get(_FOLDER_SLASH) is not None:
            if match.end(_FOLDER_SLASH) == len(text):
                return True
        elif not folder or expression.search(path):
            return True
    return False
