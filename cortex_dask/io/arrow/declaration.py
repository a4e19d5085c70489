"""Schemas that users declare, as text: ``{id: int64, tags: "list<string>", at: "timestamp[us, UTC]"}``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping

import pyarrow as pa

from cortex_dask.errors import SpecError

_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_TYPES: dict[str, pa.DataType] = {
    **{name: pa.type_for_alias(name) for name in ("bool", *_INTEGERS, "float32", "float64", "string", "binary")},
    "date": pa.date32(),
    "time": pa.time64("us"),
    "timestamp": pa.timestamp("us"),
    "duration": pa.duration("us"),
}
_ALIASES = {
    "boolean": "bool",
    "int": "int64",
    "long": "int64",
    "float": "float64",  # as in Python: a declared type should hold what a handler computes
    "double": "float64",
    "str": "string",
    "text": "string",
    "large_string": "string",
    "bytes": "binary",
    "large_binary": "binary",
    "date32": "date",
    "datetime": "timestamp",
}
_FORMS_WITH_ARGUMENTS = (
    "timestamp[s|ms|us|ns(, zone)]",
    "duration[unit]",
    "time[unit]",
    "decimal(precision, scale)",
    "list<type>",
    "list<type, length>",
    "struct<name: type, …>",
    "map<type, type>",
)
_UNITS = ("s", "ms", "us", "ns")

_NAME = re.compile(r"\s*([A-Za-z_]\w*)")
_FIELD_NAME = re.compile(r"\s*([^\s:<>,][^:<>,]*?)\s*:")
_ITEM_NAME = re.compile(r"\s*(?:item|element)\s*:")  # of a list, as Arrow prints it
_DIGITS = re.compile(r"\s*(\d+)\s*(?:,\s*(\d+)\s*)?")


def parse_schema(declared: Mapping[str, str] | pa.Schema) -> pa.Schema:
    """Return the Arrow schema that a mapping from column names to types declares; raise ``SpecError`` if it is wrong.

    Types are ``bool``, ``int8`` … ``uint64``, ``float32``, ``float64`` (also ``float`` and ``double``), ``string``,
    ``binary``, ``date``, ``time``, ``timestamp``, ``duration``, with a unit and zone in brackets where they have one,
    and ``decimal(10, 2)``, ``list<T>``, ``list<T, 3>`` (of that length), ``struct<a: T, b: T>`` and ``map<K, V>``. An
    Arrow schema is returned without its metadata.

    Examples
    --------
    >>> parse_schema({"id": "int64", "tags": "list<string>", "at": "timestamp[us, UTC]"})
    id: int64
    tags: list<item: string>
      child 0, item: string
    at: timestamp[us, tz=UTC]
    """
    if isinstance(declared, pa.Schema):
        return declared.remove_metadata()
    if not isinstance(declared, Mapping) or not declared:
        raise SpecError(f"output.schema: {declared!r} is not a mapping from column names to types, e.g. {{id: int64}}")
    fields = []
    for name, text in declared.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise SpecError(f"output.schema: {name!r}: {text!r} must map a column's name to a type, both as text")
        fields.append(pa.field(name, _TypeParser(name, text).parse()))
    return pa.schema(fields)


class _TypeParser:
    """A recursive descent over the text of one type."""

    def __init__(self, column: str, text: str) -> None:
        self._column, self._text, self._position = column, text, 0

    def parse(self) -> pa.DataType:
        """Return the type that the whole text declares."""
        found = self._type()
        if rest := self._text[self._position :].strip():
            raise self._error(f"has {rest!r} after the type")
        return found

    def _type(self) -> pa.DataType:
        written = self._match(_NAME, "a type's name")[1]
        name = _ALIASES.get(written.lower(), written.lower())
        mark, parse_arguments = _WITH_ARGUMENTS.get(name, ("", None))
        if parse_arguments is not None and self._accept(mark):
            return parse_arguments(self)
        if name not in _TYPES:
            raise self._unknown(written)
        return _TYPES[name]

    def _date(self) -> pa.DataType:
        self._until("]")  # Arrow prints date32[day]
        return _TYPES["date"]

    def _timestamp(self) -> pa.DataType:
        unit, zone = self._unit_and_zone()
        return pa.timestamp(unit, zone.removeprefix("tz=").strip() or None)

    def _duration(self) -> pa.DataType:
        return pa.duration(self._unit_and_zone()[0])

    def _time(self) -> pa.DataType:
        unit, _ = self._unit_and_zone()
        return pa.time64(unit) if unit in ("us", "ns") else pa.time32(unit)

    def _unit_and_zone(self) -> tuple[str, str]:
        unit, _, zone = (part.strip() for part in self._until("]").partition(","))
        if unit not in _UNITS:
            raise self._error(f"has the unit {unit!r}: allowed are {', '.join(_UNITS)}")
        return unit, zone

    def _decimal(self) -> pa.DataType:
        numbers = _DIGITS.fullmatch(self._until(")"))
        precision, scale = (int(numbers[1]), int(numbers[2] or 0)) if numbers else (0, 0)
        if not 0 <= scale <= precision or not 1 <= precision <= 76:
            raise self._error("needs a decimal's digits as decimal(precision, scale), at most 76")
        return pa.decimal128(precision, scale) if precision <= 38 else pa.decimal256(precision, scale)

    def _list(self) -> pa.DataType:
        if named := _ITEM_NAME.match(self._text, self._position):
            self._position = named.end()
        item = self._type()
        if not self._accept(","):
            self._expect(">")
            return pa.list_(item)
        length = self._until(">").strip()
        if not length.isdecimal() or int(length) == 0:
            raise self._error(f"has the length {length!r} for a list: a whole number above 0 is allowed")
        return pa.list_(item, int(length))

    def _map(self) -> pa.DataType:
        key = self._type()
        self._expect(",")
        item = self._type()
        self._expect(">")
        return pa.map_(key, item)

    def _struct(self) -> pa.DataType:
        fields = [self._field()]
        while self._accept(","):
            fields.append(self._field())
        self._expect(">")
        return pa.struct(fields)

    def _field(self) -> tuple[str, pa.DataType]:
        name = self._match(_FIELD_NAME, "a field's name and a colon inside struct<…>")[1]
        return name, self._type()

    def _match(self, pattern: re.Pattern[str], wanted: str) -> re.Match[str]:
        match = pattern.match(self._text, self._position)
        if match is None:
            raise self._error(f"lacks {wanted}")
        self._position = match.end()
        return match

    def _accept(self, mark: str) -> bool:
        """Pass over a mark, if it comes next."""
        rest = self._text[self._position :].lstrip()
        if not rest.startswith(mark):
            return False
        self._position = len(self._text) - len(rest) + len(mark)
        return True

    def _expect(self, mark: str) -> None:
        if not self._accept(mark):
            raise self._error(f"lacks a {mark!r} at {self._text[self._position :]!r}")

    def _until(self, mark: str) -> str:
        """Return the text before the next such mark, and pass over both."""
        end = self._text.find(mark, self._position)
        if end < 0:
            raise self._error(f"lacks a {mark!r}")
        inside, self._position = self._text[self._position : end], end + 1
        return inside

    def _error(self, problem: str) -> SpecError:
        return SpecError(f"output.schema: the type {self._text!r} of column {self._column!r} {problem}")

    def _unknown(self, name: str) -> SpecError:
        known = [*_TYPES, *_ALIASES, "list<string>", "struct<a: int64>", "map<string, int64>", "decimal(10, 2)"]
        nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        meant = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        return self._error(f"is unknown{meant}: allowed are {', '.join((*_TYPES, *_FORMS_WITH_ARGUMENTS))}")


#: The mark that opens the arguments of a type, and what parses them.
_WITH_ARGUMENTS: dict[str, tuple[str, Callable[[_TypeParser], pa.DataType]]] = {
    "timestamp": ("[", _TypeParser._timestamp),
    "duration": ("[", _TypeParser._duration),
    "time": ("[", _TypeParser._time),
    "time32": ("[", _TypeParser._time),
    "time64": ("[", _TypeParser._time),
    "date": ("[", _TypeParser._date),
    "decimal": ("(", _TypeParser._decimal),
    "decimal128": ("(", _TypeParser._decimal),
    "decimal256": ("(", _TypeParser._decimal),
    "list": ("<", _TypeParser._list),
    "map": ("<", _TypeParser._map),
    "struct": ("<", _TypeParser._struct),
}
