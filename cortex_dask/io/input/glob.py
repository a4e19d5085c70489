r"""Globs over full paths, as ``includes`` and ``excludes`` of file lists write them.

==============  ======================================================================================
``*``           any characters but ``/``, also none
``**``          any characters, ``/`` as well: ``**.jpg`` is every path that ends in ``.jpg``
``?``           one character that is not ``/``
``[a-z]``       one of these characters; ``[!a-z]`` one that is none of these (here ``/`` is one like others)
``{a,b}``       ``a`` or ``b``, which are patterns themselves
``\x``          the character ``x`` as it is
==============  ======================================================================================

A pattern has to fit the whole path, and capital letters count.
"""

from __future__ import annotations

import re
from collections.abc import Sequence


class PathFilter:
    """Tells which paths are wanted: those that an include matches (or all, without any) and no exclude.

    Parameters
    ----------
    includes, excludes : sequence of str
        Globs.

    Examples
    --------
    >>> wanted = PathFilter(["**.png"], ["**/thumbs/**"])
    >>> wanted("s3://bucket/a/1.png"), wanted("s3://bucket/thumbs/1.png")
    (True, False)
    """

    def __init__(self, includes: Sequence[str] = (), excludes: Sequence[str] = ()) -> None:
        self._includes = [compile_glob(pattern) for pattern in includes]
        self._excludes = [compile_glob(pattern) for pattern in excludes]

    def __call__(self, path: str) -> bool:
        """Tell whether a path is wanted."""
        if self._includes and not any(pattern.fullmatch(path) for pattern in self._includes):
            return False
        return not any(pattern.fullmatch(path) for pattern in self._excludes)


def compile_glob(pattern: str) -> re.Pattern[str]:
    r"""Return a glob as a regular expression, for ``fullmatch``.

    Raises
    ------
    ValueError
        If the pattern is malformed; the message ends a sentence that begins with the pattern.

    Examples
    --------
    >>> bool(compile_glob("**/img_[0-9]?.{jpg,png}").fullmatch("s3://bucket/a/img_12.png"))
    True
    """
    if not pattern:
        raise ValueError("is empty; ** matches every path")
    return re.compile(_Translation(pattern).result(), re.DOTALL)


class _Translation:
    """One pass over a pattern."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0

    def result(self) -> str:
        text, open_braces = "", []
        while self._at < len(self._pattern):
            start, character = self._at, self._take()
            if character == "\\":
                text += re.escape(self._escaped(start))
            elif character == "*":
                stars = 1
                while self._pattern.startswith("*", self._at):
                    stars, self._at = stars + 1, self._at + 1
                text += ".*" if stars > 1 else "[^/]*"
            elif character == "?":
                text += "[^/]"
            elif character == "[":
                text += self._class(start)
            elif character == "{":
                open_braces.append(start)
                text += "(?:"
            elif character == "," and open_braces:
                text += "|"
            elif character == "}" and open_braces:
                open_braces.pop()
                text += ")"
            else:
                text += re.escape(character)
        if open_braces:
            raise ValueError(
                f"has a {{ at character {open_braces[-1] + 1} that no }} closes; write \\{{ for the character itself"
            )
        return text

    def _take(self) -> str:
        self._at += 1
        return self._pattern[self._at - 1]

    def _escaped(self, start: int) -> str:
        if self._at == len(self._pattern):
            raise ValueError(f"ends with the \\ at character {start + 1}; write \\\\ for the character itself")
        return self._take()

    def _class(self, start: int) -> str:
        negated = self._pattern.startswith("!", self._at)
        self._at += negated
        members = ""
        while (low := self._member(start)) is not None:
            high: str | None = low
            ranged = self._pattern.startswith("-", self._at) and not self._pattern.startswith("-]", self._at)
            if ranged:
                at = self._at
                self._at += 1
                high = self._member(start)
                assert high is not None  # "-]" is none
                if high < low:
                    raise ValueError(
                        f"has the range {low}-{high} at character {at} the wrong way round; write {high}-{low}"
                    )
            members += re.escape(low) if not ranged else f"{re.escape(low)}-{re.escape(high or low)}"
        if not members:
            raise ValueError(
                f"has an empty [] at character {start + 1}; name characters, and write \\[ or \\] for the brackets"
            )
        return f"[{'^' if negated else ''}{members}]"

    def _member(self, start: int) -> str | None:
        """Return the next character of a class; None where it ends."""
        if self._at == len(self._pattern):
            raise ValueError(f"has a [ at character {start + 1} that no ] closes; write \\[ for the character itself")
        at, character = self._at, self._take()
        if character == "]":
            return None
        return self._escaped(at) if character == "\\" else character
