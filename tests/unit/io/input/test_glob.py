"""Globs, against a matcher that works in another way: braces spelt out, then characters one by one."""

from __future__ import annotations

import re
from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cortex_dask.io.input.glob import PathFilter, compile_glob

# a pattern as a tree, its text, and what it means ---------------------------------------------------------------------

letters = st.sampled_from("ab-/.,]}")
members = st.lists(st.sampled_from(["a", "b", "c", "a-b", "b-d", "/", "\\]", "\\-", "^", "!a"]), min_size=1, max_size=3)
classes = st.builds(lambda negated, inside: ("class", negated, inside), st.booleans(), members).filter(
    lambda item: item[1] or not item[2][0].startswith("!")
)
atoms = st.one_of(
    letters.map(lambda text: ("text", text)),
    st.sampled_from("*?[]{},\\!a").map(lambda text: ("escaped", text)),
    st.sampled_from([("star",), ("stars",), ("any",)]),
    classes,
)
patterns = st.recursive(
    st.lists(atoms, max_size=4),
    lambda inner: st.lists(
        atoms | st.lists(inner, min_size=1, max_size=3).map(lambda all: ("either", all)), max_size=4
    ),
    max_leaves=6,
)


def written(tree: list, inside: bool = False) -> str:
    text = ""
    for item in tree:
        match item:
            case ("text", character):
                text += "\\" + character if inside and character in ",}" else character
            case ("escaped", character):
                text += "\\" + character
            case ("star",):
                text += "*"
            case ("stars",):
                text += "**"
            case ("any",):
                text += "?"
            case ("class", negated, ranges):
                text += f"[{'!' if negated else ''}{''.join(ranges)}]"
            case ("either", choices):
                text += "{" + ",".join(written(choice, inside=True) for choice in choices) + "}"
    return text


def flat(tree: list) -> list[list]:
    """Spell out the braces; stars that meet become two, as they are read."""
    found = [[]]
    for item in tree:
        if item[0] == "either":
            found = [start + rest for start in found for choice in item[1] for rest in flat(choice)]
        else:
            found = [[*start, item] for start in found]
    return found


def in_class(ranges: list[str], character: str) -> bool:
    for entry in ranges:
        if len(entry) == 3:
            if entry[0] <= character <= entry[2]:
                return True
        elif character in (entry[1:] if entry.startswith("\\") else entry):
            return True
    return False


def fits(items: tuple, path: str) -> bool:
    @cache
    def at(item: int, place: int) -> bool:
        if item == len(items):
            return place == len(path)
        kind, *rest = items[item]
        if kind in ("star", "stars"):
            more = place < len(path) and (kind == "stars" or path[place] != "/")
            return at(item + 1, place) or (more and at(item, place + 1))
        if place == len(path):
            return False
        character = path[place]
        if kind == "any":
            good = character != "/"
        elif kind == "class":
            good = in_class(rest[1], character) != rest[0]
        else:
            good = character == rest[0]
        return good and at(item + 1, place + 1)

    return at(0, 0)


def joined(tree: list) -> list:
    """Merge stars that stand side by side in the text: they are one ``**``."""
    found: list = []
    for item in tree:
        if item[0] in ("star", "stars") and found and found[-1][0] in ("star", "stars"):
            found[-1] = ("stars",)
        elif item[0] == "either":
            found.append(("either", [joined(choice) for choice in item[1]]))
        else:
            found.append(item)
    return found


def hashable(items: list) -> tuple:
    return tuple(items)


@settings(max_examples=400, deadline=None)
@given(patterns, st.text("abcd-/.,]}*?^!{[\\", max_size=6))
@example([("text", "a"), ("stars",), ("text", "b")], "a/x/b")
@example([("class", True, ["a"])], "/")
@example([("either", [[("text", "a")], [("either", [[("star",)], [("text", "/")]])]])], "/")
def test_globs_mean_what_a_character_by_character_matcher_says(tree: list, path: str) -> None:
    tree = joined(tree)
    pattern = written(tree)
    if not pattern:
        return
    expected = any(fits(hashable(items), path) for items in flat(tree))
    assert bool(compile_glob(pattern).fullmatch(path)) is expected, (pattern, path)


@pytest.mark.parametrize(
    ("pattern", "matched", "missed"),
    [
        ("**.jpg", ["s3://b/a.jpg", "s3://b/a/b.jpg"], ["s3://b/a.JPG", "s3://b/a.jpg.txt"]),
        ("s3://b/*.jpg", ["s3://b/a.jpg", "s3://b/.jpg"], ["s3://b/a/b.jpg"]),
        ("**/img_?.png", ["s3://b/img_1.png"], ["s3://b/img_12.png", "s3://b/img_/.png"]),
        ("**/[a-c][!0-9].x", ["/ba.x", "/b//c/x/cz.x"], ["/da.x", "/a5.x"]),
        ("**.{jpg,p{n,pn}g}", ["/a.jpg", "/a.png", "/a.ppng"], ["/a.gif", "/a.pg"]),
        (r"/a\*\{1\}\[x\]\\", [r"/a*{1}[x]" + "\\"], ["/ab{1}[x]\\"]),
        ("/a{,.gz}", ["/a", "/a.gz"], ["/a.bz2"]),
        ("/a.b", ["/a.b"], ["/axb"]),
        ("/new\n**", ["/new\nline\n"], ["/new"]),
        ("/ä[à-ü]**", ["/äé/ß"], ["/äz"]),
        ("a**b", ["ab", "a/b", "axb"], ["a/bc"]),
    ],
)
def test_globs(pattern: str, matched: list[str], missed: list[str]) -> None:
    glob = compile_glob(pattern)
    assert [path for path in matched + missed if glob.fullmatch(path)] == matched


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("", "is empty"),
        ("a[b", "has a [ at character 2 that no ] closes"),
        ("a[b\\", "ends with the \\ at character 4"),
        ("a[!", "has a [ at character 2 that no ] closes"),
        ("x[]", "has an empty [] at character 2"),
        ("x[!]", "has an empty [] at character 2"),
        ("[z-a]", "has the range z-a at character 2 the wrong way round; write a-z"),
        ("{a,{b}", "has a { at character 1 that no } closes"),
        ("a\\", "ends with the \\ at character 2; write \\\\"),
    ],
)
def test_a_malformed_glob_says_what_is_wrong_with_it(pattern: str, problem: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}"):
        compile_glob(pattern)


@given(st.text("[]{}!*?,-\\ab", max_size=10))
def test_every_pattern_compiles_or_is_refused_in_a_sentence(pattern: str) -> None:
    try:
        compile_glob(pattern).fullmatch("ab/ab")
    except ValueError as error:
        assert str(error).startswith(("is empty", "has a", "has the range", "ends with"))  # noqa: PT017


def test_includes_come_first_and_excludes_have_the_last_word() -> None:
    wanted = PathFilter(["**.png", "**/keep/**"], ["**/no/**"])
    paths = ["/a.png", "/keep/a", "/no/a.png", "/keep/no/a", "/a.txt"]
    assert [path for path in paths if wanted(path)] == ["/a.png", "/keep/a"]
    assert all(map(PathFilter(), paths))
