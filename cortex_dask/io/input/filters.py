"""Row filters: the (column, operator, value) triples that pyarrow and dask take, checked, applied and pushed down.

``[("a", ">", 1), ("b", "=", "x")]`` selects rows that pass both; a list of such lists selects rows that pass any one
of them. Operators: ``= == != < > <= >= in``, and ``not in``. As in SQL, a null (or a missing key of a JSON record)
passes no comparison, not even ``!=`` and ``not in``.
"""

from __future__ import annotations

import datetime
import difflib
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from cortex_dask.errors import DatasetError

if TYPE_CHECKING:
    import pyarrow as pa

OPERATORS = ("=", "==", "!=", "<", ">", "<=", ">=", "in", "not in")

#: What statistics prove: that no row passes, that all pass, or nothing.
Verdict = Literal["none", "all", "some"]

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
}

_ARROW = {"=": "equal", "!=": "not_equal", "<": "less", ">": "greater", "<=": "less_equal", ">=": "greater_equal"}


class Predicate(NamedTuple):
    """One comparison; ``value`` is a list for ``in`` and ``not in``."""

    column: str
    op: str  # "==" is written "="
    value: Any

    def __str__(self) -> str:
        return f"{self.column} {self.op} {self.value!r}"


#: Disjunction of conjunctions.
Filters = tuple[tuple[Predicate, ...], ...]


class Bounds(NamedTuple):
    """What statistics say of one column of a row group; None: nothing."""

    low: Any
    high: Any
    nulls: int | None
    rows: int
    floats: bool = False  # statistics of floats leave NaN out


def parse_filters(value: Any) -> Filters | None:
    """Check the shape of filters as a user gives them; None and the empty list filter nothing.

    Raises
    ------
    DatasetError
        If a filter is not a triple with a known operator and a value that can be compared.
    """
    if value is None or (isinstance(value, (list, tuple)) and not value):
        return None
    if not isinstance(value, (list, tuple)) or isinstance(value[0], str):
        raise DatasetError(
            f"filters = {value!r} is not a list of (column, operator, value): write, say, [('year', '>=', 2024)]"
        )
    groups = value if _is_group(value[0]) else [value]
    return tuple(tuple(_predicate(item) for item in group) for group in groups)


def _is_group(item: Any) -> bool:
    return isinstance(item, (list, tuple)) and bool(item) and not isinstance(item[0], str)


def _predicate(item: Any) -> Predicate:
    if not isinstance(item, (list, tuple)) or len(item) != 3 or not isinstance(item[0], str):
        raise DatasetError(f"filter {item!r} is not (column, operator, value), such as ('year', '>=', 2024)")
    column, op, value = item
    if op not in OPERATORS:
        raise DatasetError(f"filter {item!r} has the unknown operator {op!r}: allowed are {', '.join(OPERATORS)}")
    if op in ("in", "not in"):
        if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
            raise DatasetError(f"filter {item!r} needs a list of values after {op!r}")
        values = [_plain(one, item) for one in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
        return Predicate(column, op, values)
    return Predicate(column, "=" if op == "==" else op, _plain(value, item))


def _plain(value: Any, item: Any) -> Any:
    if hasattr(value, "item") and callable(value.item):  # a scalar of NumPy
        value = value.item()
    if value is None:
        raise DatasetError(f"filter {item!r} compares with null, which no row equals: leave it out")
    if isinstance(value, float) and math.isnan(value):
        raise DatasetError(f"filter {item!r} compares with NaN, which no row equals: leave it out")
    if not isinstance(value, (bool, int, float, str, Decimal, datetime.date, datetime.time)):
        raise DatasetError(
            f"filter {item!r} compares with a {type(value).__name__}: "
            "allowed are numbers, text, true and false, dates and times"
        )
    return value


def columns_of(filters: Filters | None) -> tuple[str, ...]:
    """Return the columns that the filters look at, each once."""
    return tuple(dict.fromkeys(predicate.column for group in filters or () for predicate in group))


def plain_filters(filters: Filters | None, *, exact: bool = True) -> Any:
    """Return the filters as JSON values.

    From those of bound filters, :func:`parse_filters` and :func:`bind` make the same ones again; with ``exact`` unset,
    decimals become numbers, as JSON records have them.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(one) for one in value]
        if isinstance(value, (datetime.date, datetime.time)):
            return value.isoformat()
        if isinstance(value, Decimal):
            return str(value) if exact else float(value)
        return value

    return None if filters is None else [[[p.column, p.op, plain(p.value)] for p in group] for group in filters]


def unknown_column(name: str, known: Iterable[str], where: str) -> DatasetError:
    """Return the error for a column that the input does not have."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")
    return DatasetError(f"{where} names the column {name!r}, which the input does not have: {hint}It has {shown}")


# columns with types ---------------------------------------------------------------------------------------------------


def bind(filters: Filters, schema: pa.Schema) -> Filters:
    """Turn the values into those of the columns' types.

    Raises
    ------
    DatasetError
        If a column does not exist, or its type cannot be compared with the value.
    """
    for name in columns_of(filters):
        if schema.get_field_index(name) < 0:
            raise unknown_column(name, schema.names, "filters")
    return tuple(
        tuple(_bound(predicate, schema.field(predicate.column).type) for predicate in group) for group in filters
    )


def _bound(predicate: Predicate, kind: pa.DataType) -> Predicate:
    import pyarrow.types as pt

    if pt.is_dictionary(kind):
        kind = kind.value_type
    value = predicate.value
    bound = (
        [_typed(one, kind, predicate) for one in value] if isinstance(value, list) else _typed(value, kind, predicate)
    )
    predicate = predicate._replace(value=bound)
    return _whole(predicate, kind) if pt.is_integer(kind) else predicate


def _typed(value: Any, kind: pa.DataType, predicate: Predicate) -> Any:
    """Return the value as the column's type has it."""
    import pyarrow as pa
    import pyarrow.types as pt

    number = isinstance(value, (int, float, Decimal)) and not isinstance(value, bool)
    try:
        if pt.is_null(kind) or (pt.is_boolean(kind) and isinstance(value, bool)) or (pt.is_integer(kind) and number):
            return value
        if pt.is_floating(kind) and number:
            return float(pa.scalar(float(value), kind).as_py())  # 0.1 equals a float32 that was made of 0.1
        if pt.is_decimal(kind) and (number or isinstance(value, str)):
            return Decimal(repr(value) if isinstance(value, float) else value)
        if (pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind)) and isinstance(value, str):
            return value
        if pt.is_date(kind) or pt.is_timestamp(kind):
            return pa.scalar(_moment(value, kind), kind) and _moment(value, kind)
        if pt.is_time(kind):
            time = datetime.time.fromisoformat(value) if isinstance(value, str) else value
            return pa.scalar(time, kind) and time
    except (ValueError, TypeError, ArithmeticError, pa.ArrowException):
        pass
    raise DatasetError(
        f"filter {predicate} cannot be: the column {predicate.column!r} is {kind}, "
        f"which does not compare with {value!r} ({type(value).__name__})"
    )


def _whole(predicate: Predicate, kind: pa.DataType) -> Predicate:
    """Say the same with whole numbers in the column's range: Arrow does not compare integers with others exactly."""
    bits, signed = kind.bit_width, str(kind).startswith("int")
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    never, always = predicate._replace(op="in", value=[]), predicate._replace(op="not in", value=[])
    op, value = predicate.op, predicate.value
    if isinstance(value, list):
        return predicate._replace(value=[int(one) for one in value if low <= one <= high and one == int(one)])
    if op in ("=", "!="):
        if low <= value <= high and value == int(value):
            return predicate._replace(value=int(value))
        return never if op == "=" else always
    below = op in ("<", "<=")
    if value < low:
        return never if below else always
    if value > high:
        return always if below else never
    if value != int(value):  # x < 1.5 and x <= 1.5 are x <= 1; x > 1.5 and x >= 1.5 are x > 1
        return predicate._replace(op="<=" if below else ">", value=math.floor(value))
    return predicate._replace(value=int(value))


def _moment(value: Any, kind: pa.DataType) -> datetime.date:
    """Return a date or a time as the column has it; a time without a zone is UTC in a column with one."""
    import pyarrow.types as pt

    if isinstance(value, str):
        value = datetime.datetime.fromisoformat(value)
    if not isinstance(value, datetime.date):
        raise TypeError
    if not isinstance(value, datetime.datetime):
        value = datetime.datetime.combine(value, datetime.time())
    moment: datetime.datetime = value
    if pt.is_date(kind):
        if moment.time() != datetime.time() or moment.tzinfo is not None:
            raise ValueError
        return moment.date()
    if (moment.tzinfo is None) == (kind.tz is None):
        return moment
    if moment.tzinfo is None:
        return moment.replace(tzinfo=datetime.UTC)
    raise ValueError


def mask(filters: Filters, table: pa.Table) -> pa.ChunkedArray:
    """Return which rows of the table pass: booleans without nulls; a column that is not there is null."""
    import pyarrow.compute as pc

    passing = None
    for group in filters:
        every = None
        for predicate in group:
            one = _compare(predicate, table)
            every = one if every is None else pc.and_(every, one)
        passing = every if passing is None else pc.or_(passing, every)
    return passing


def _compare(predicate: Predicate, table: pa.Table) -> pa.ChunkedArray:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.types as pt

    index = table.schema.get_field_index(predicate.column)
    if index < 0 or pt.is_null(table.schema.field(index).type):
        return pa.chunked_array([pa.repeat(pa.scalar(False), table.num_rows)])
    column = table.column(index)
    if pt.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pt.is_string_view(column.type) or pt.is_float16(column.type):  # Arrow has no comparisons for these
        column = column.cast(pa.string() if pt.is_string_view(column.type) else pa.float32())
    kind = None if pt.is_decimal(column.type) else column.type
    if isinstance(predicate.value, list):
        values = pa.array(predicate.value, kind or (None if predicate.value else column.type))
        inside = pc.is_in(column, value_set=values.cast(column.type) if kind is None else values)
        return pc.and_(pc.is_valid(column), pc.invert(inside)) if predicate.op == "not in" else inside
    function = _ARROW[predicate.op]
    return pc.call_function(function, [column, pa.scalar(predicate.value, kind)]).fill_null(False)


def judge(filters: Filters, bounds: Callable[[str], Bounds]) -> Verdict:
    """Tell what statistics prove about the rows of a row group.

    ``bounds`` gives the statistics of a column; a column that the file does not have is all null.
    """
    verdicts = []
    for group in filters:
        each = [_judge(predicate, bounds(predicate.column)) for predicate in group]
        verdicts.append("none" if "none" in each else "some" if "some" in each else "all")
    if "all" in verdicts:
        return "all"
    return "some" if "some" in verdicts else "none"


def _judge(predicate: Predicate, bounds: Bounds) -> Verdict:
    op, value = predicate.op, predicate.value
    low, high = bounds.low, bounds.high
    if bounds.nulls == bounds.rows or (op == "in" and not value):
        return "none"
    certain = bounds.nulls == 0
    if op == "not in" and not value:
        return "all" if certain else "some"
    if low is None or high is None:
        return "some"
    try:
        verdict = _judge_range(op, value, low, high)
    except TypeError:  # statistics in another form than the values
        return "some"
    if verdict == "all" and (not certain or bounds.floats):
        return "some"
    if verdict == "none" and bounds.floats and op in ("!=", "not in"):  # NaN passes these
        return "some"
    return verdict


def _judge_range(op: str, value: Any, low: Any, high: Any) -> Verdict:
    """Judge values that all lie between ``low`` and ``high``; the bounds may be wider than the values."""
    if op in ("in", "not in"):
        outside = all(one < low or one > high for one in value)
        inside = low == high and low in value
    elif op in ("=", "!="):
        outside = value < low or value > high
        inside = low == high == value
    else:
        compare = _COMPARE[op]
        ends = (compare(low, value), compare(high, value))
        return "all" if all(ends) else "some" if any(ends) else "none"
    if op in ("!=", "not in"):
        outside, inside = inside, outside
    return "none" if outside else "all" if inside else "some"


# records --------------------------------------------------------------------------------------------------------------


def matcher(filters: Filters) -> Callable[[Mapping[str, Any]], bool]:
    """Return a function that tells whether a JSON record passes.

    Values are compared as they are written: numbers with numbers, text with text (so ISO dates compare as text).
    Values of different kinds are different, and neither smaller nor larger.
    """
    groups = [[(p.column, _tester(p)) for p in group] for group in filters]

    def matches(record: Mapping[str, Any]) -> bool:
        return any(all(test(record.get(column)) for column, test in group) for group in groups)

    return matches


def _tester(predicate: Predicate) -> Callable[[Any], bool]:
    op, value = predicate.op, predicate.value
    if isinstance(value, list):
        wanted = [_json_value(one) for one in value]
        negated = op == "not in"

        def test_in(found: Any) -> bool:
            return found is not None and any(_same_kind(found, one) and found == one for one in wanted) != negated

        return test_in
    compare, expected = _COMPARE[op], _json_value(value)

    def test(found: Any) -> bool:
        if found is None:
            return False
        return bool(compare(found, expected)) if _same_kind(found, expected) else op == "!="

    return test


def _json_value(value: Any) -> Any:
    return value.isoformat() if isinstance(value, (datetime.date, datetime.time)) else value


def _same_kind(left: Any, right: Any) -> bool:
    if isinstance(left, bool) or isinstance(right, bool):
        return isinstance(left, bool) and isinstance(right, bool)
    number = (int, float, Decimal)
    return (isinstance(left, number) and isinstance(right, number)) or (
        isinstance(left, str) and isinstance(right, str)
    )
