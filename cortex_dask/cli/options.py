"""Options that several commands share, and their texts parsed into values."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])

_FILTER = re.compile(
    r"\s*(?P<column>`[^`]+`|[^\s=!<>`]+)\s*(?P<op>==|!=|<=|>=|=|<|>|\bnot\s+in\b|\bin\b)\s*(?P<value>.+?)\s*", re.DOTALL
)


def cluster(command: _Command) -> _Command:
    """Add ``--cluster`` and ``--cluster-option``."""
    where = click.option(
        "--cluster",
        metavar="WHERE",
        help="local, inline, the address of a Dask scheduler (tcp://host:8786), gateway or kubernetes.",
    )
    how = click.option(
        "--cluster-option",
        "cluster_option",
        multiple=True,
        metavar="KEY=VALUE",
        help="How that cluster is made; also JSON, or @file.",
    )
    return where(how(command))


def environment(command: _Command) -> _Command:
    """Add ``-e``."""
    return click.option("-e", "--env", metavar="NAME", help="The environment; the default one when left out.")(command)


def output_format(command: _Command) -> _Command:
    """Add ``-o pretty|json``."""
    kinds = click.Choice(["pretty", "json"])
    return click.option("-o", "output_format", type=kinds, default="pretty", help="How to print.")(command)


def api_argument(command: _Command) -> _Command:
    """Add the argument ``API``."""
    return click.argument("api", metavar="API")(command)


def job_argument(command: _Command) -> _Command:
    """Add the argument ``JOB``."""
    return click.argument("job_id", metavar="JOB")(command)


def columns(text: str | None) -> list[str] | None:
    """Return the columns of ``a,b``."""
    return None if text is None else _names("--columns", text)


def keep(text: str | None) -> bool | list[str] | None:
    """Return ``True`` for ``all``, the columns of ``a,b``."""
    if text is None:
        return None
    return True if text == "all" else _names("--keep", text)


def _names(option: str, text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise click.BadParameter(f"found {text!r}; give names with commas between them: a,b", param_hint=option)
    return names


def max_failed(text: str | None) -> float | str | None:
    """Return a number of batches; a share such as ``5%`` stays text, which the submission takes as well."""
    if text is None or text.endswith("%"):
        return text
    try:
        return float(text)
    except ValueError:
        raise click.BadParameter(
            f"found {text!r}; give a number of batches (10) or a share (5%)", param_hint="--max-failed-batches"
        ) from None


def filters(texts: Sequence[str]) -> list[tuple[str, str, Any]] | None:
    """Return comparisons that must all hold, e.g. ``("x", ">", 5)`` for ``"x > 5"``."""
    return [_comparison(text) for text in texts] or None


def _comparison(text: str) -> tuple[str, str, Any]:
    match = _FILTER.fullmatch(text)
    if match is None:
        raise click.BadParameter(
            f'found {text!r}; write a comparison such as "x > 5", "label = \'cat\'" or "y in [1, 2]" '
            "(= != < <= > >= in, not in)",
            param_hint="--filter",
        )
    op = " ".join(match["op"].split())
    value = match["value"]
    if op in ("in", "not in"):
        return match["column"].strip("`"), op, _members(value)
    return match["column"].strip("`"), op, _scalar(value)


def _members(text: str) -> list[Any]:
    if text[:1] + text[-1:] in ("[]", "()"):
        text = text[1:-1]
    return [_scalar(item.strip()) for item in re.findall(r"""\s*("[^"]*"|'[^']*'|[^,]+)""", text)]


def _scalar(text: str) -> Any:
    """Return a JSON value; other text as it is, without single quotes around it."""
    import orjson

    if len(text) >= 2 and text[0] == text[-1] == "'":
        return text[1:-1]
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def config(texts: Sequence[str]) -> dict[str, Any] | None:
    """Return the job's config from texts ``key=value``, JSON objects or ``@file`` (YAML, JSON); later ones win."""
    return _mapping(texts, "--config")


def cluster_options(texts: Sequence[str]) -> dict[str, Any] | None:
    """Return the options of a cluster, from texts like those of ``--config``."""
    return _mapping(texts, "--cluster-option")


def _mapping(texts: Sequence[str], option: str) -> dict[str, Any] | None:
    merged: dict[str, Any] = {}
    for text in texts:
        _merge(merged, _pairs(text, option))
    return merged or None


def _pairs(text: str, option: str) -> dict[str, Any]:
    if text.startswith("@"):
        import yaml

        try:
            value = yaml.safe_load(Path(text[1:]).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise click.BadParameter(
                f"{text[1:]} is neither YAML nor JSON: {' '.join(str(error).split())}", param_hint=option
            ) from None
        if not isinstance(value, dict):
            raise click.BadParameter(
                f"{text[1:]} holds a {type(value).__name__}; it must be a mapping", param_hint=option
            )
        return value
    if text.lstrip().startswith("{"):
        import orjson

        try:
            parsed: dict[str, Any] = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise click.BadParameter(f"found JSON that does not parse: {error}", param_hint=option) from None
        return parsed
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise click.BadParameter(f"found {text!r}; give key=value, a JSON object or @file", param_hint=option)
    nested: Any = _scalar(value)
    for name in reversed(key.strip().split(".")):
        nested = {name: nested}
    result: dict[str, Any] = nested
    return result


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
