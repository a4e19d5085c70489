"""Schemas that users declare, as text: ``{id: int64, tags: "list<string>", at: "timestamp[us, UTC]"}``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping

import pyarrow as pa

from cortex_dask.errors import SpecError

_PLAIN: dict[str, pa.DataType] = {
    "bool": pa.bool_(),
    "int8": pa.int8(),
    "int16": pa.int16(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "uint8": pa.uint8(),
    "uint16": pa.uint16(),
    "uint32": pa.uint32(),
    "uint64": pa.uint64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "string": pa.string(),
    "binary": pa.binary(),
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
_FORMS = (
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


def parse(declared: Mapping[str, str] | pa.Schema) -> pa.Schema:
    """Return the Arrow schema that a mapping from column names to types declares.

    Types are ``bool``, ``int8`` … ``uint64``, ``float32``, ``float64`` (also ``float`` and ``double``), ``string``,
    ``binary``, ``date``, ``time``, ``timestamp``, ``duration``, with a unit and zone in brackets where they have one,
    and ``decimal(10, 2)``, ``list<T>``, ``list<T, 3>`` (of that length), ``struct<a: T, b: T>`` and ``map<K, V>``. An
    Arrow schema is returned without its metadata.

    Examples
    --------
    >>> parse({"id": "int64", "tags": "list<string>", "at": "timestamp[us, UTC]"})
    id: int64
    tags: list<item: string>
      child 0, item: string
    at: timestamp[us, tz=UTC]

    Raises
    ------
    SpecError
        If a type is unknown, or there is no column.
    """
    if isinstance(declared, pa.Schema):
        return declared.remove_metadata()
    if not isinstance(declared, Mapping) or not declared:
        raise SpecError(f"output.schema: {declared!r} is not a mapping from column names to types, e.g. {{id: int64}}")
    fields = []
    for name, text in declared.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise SpecError(f"output.schema: {name!r}: {text!r} must map a column's name to a type, both as text")
        fields.append(pa.field(name, _TypeText(name, text).parse()))
    return pa.schema(fields)


class _TypeText:
    """A recursive descent over the text of one type."""

    def __init__(self, column: str, text: str) -> None:
        self.column, self.text, self.position = column, text, 0

    def parse(self) -> pa.DataType:
        kind = self._type()
        if self.text[self.position :].strip():
            raise self._error(f"has {self.text[self.position :].strip()!r} after the type")
        return kind

    def _type(self) -> pa.DataType:
        match = re.compile(r"\s*([A-Za-z_]\w*)").match(self.text, self.position)
        if match is None:
            raise self._error("lacks a type's name")
        self.position = match.end()
        name = match[1].lower()
        name = _ALIASES.get(name, name)
        if name in ("timestamp", "duration", "time", "time32", "time64") and self._take("["):
            return self._timed(name)
        if name in ("decimal", "decimal128", "decimal256") and self._take("("):
            return self._decimal()
        if name == "list" and self._take("<"):
            return self._list()
        if name == "map" and self._take("<"):
            key = self._type()
            self._expect(",")
            item = self._type()
            self._expect(">")
            return pa.map_(key, item)
        if name == "struct" and self._take("<"):
            return self._struct()
        if name == "date" and self._take("["):
            self._until("]")
        if name not in _PLAIN:
            raise self._unknown(match[1])
        return _PLAIN[name]

    def _timed(self, name: str) -> pa.DataType:
        unit, _, zone = (part.strip() for part in self._until("]").partition(","))
        if unit not in _UNITS:
            raise self._error(f"has the unit {unit!r}: allowed are {', '.join(_UNITS)}")
        if name == "timestamp":
            return pa.timestamp(unit, zone.removeprefix("tz=").strip() or None)
        if name == "duration":
            return pa.duration(unit)
        return pa.time64(unit) if unit in ("us", "ns") else pa.time32(unit)

    def _decimal(self) -> pa.DataType:
        numbers = re.fullmatch(r"\s*(\d+)\s*(?:,\s*(\d+)\s*)?", self._until(")"))
        precision, scale = (int(numbers[1]), int(numbers[2] or 0)) if numbers else (0, 0)
        if not 0 <= scale <= precision or not 1 <= precision <= 76:
            raise self._error("needs a decimal's digits as decimal(precision, scale), at most 76")
        return pa.decimal128(precision, scale) if precision <= 38 else pa.decimal256(precision, scale)

    def _list(self) -> pa.DataType:
        named = re.compile(r"\s*(?:item|element)\s*:").match(self.text, self.position)  # as Arrow prints it
        self.position = named.end() if named else self.position
        value = self._type()
        if not self._take(","):
            self._expect(">")
            return pa.list_(value)
        length = self._until(">").strip()
        if not length.isdecimal() or int(length) == 0:
            raise self._error(f"has the length {length!r} for a list: a whole number above 0 is allowed")
        return pa.list_(value, int(length))

    def _struct(self) -> pa.DataType:
        fields = []
        while True:
            name = re.compile(r"\s*([^\s:<>,][^:<>,]*?)\s*:").match(self.text, self.position)
            if name is None:
                raise self._error("lacks a field's name and a colon inside struct<…>")
            self.position = name.end()
            fields.append((name[1], self._type()))
            if not self._take(","):
                self._expect(">")
                return pa.struct(fields)

    def _take(self, mark: str) -> bool:
        rest = self.text[self.position :]
        if not rest.lstrip().startswith(mark):
            return False
        self.position = len(self.text) - len(rest.lstrip()) + 1
        return True

    def _expect(self, mark: str) -> None:
        if not self._take(mark):
            raise self._error(f"lacks a {mark!r} at {self.text[self.position :]!r}")

    def _until(self, mark: str) -> str:
        end = self.text.find(mark, self.position)
        if end < 0:
            raise self._error(f"lacks a {mark!r}")
        inside, self.position = self.text[self.position : end], end + 1
        return inside

    def _error(self, what: str) -> SpecError:
        return SpecError(f"output.schema: the type {self.text!r} of column {self.column!r} {what}")

    def _unknown(self, name: str) -> SpecError:
        known = [*_PLAIN, *_ALIASES, "list<string>", "struct<a: int64>", "map<string, int64>", "decimal(10, 2)"]
        nearest = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        meant = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        return SpecError(
            f"output.schema: the type {self.text!r} of column {self.column!r} is unknown{meant}: "
            f"allowed are {', '.join((*_PLAIN, *_FORMS))}"
        )
