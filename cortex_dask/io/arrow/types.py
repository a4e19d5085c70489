"""What two Arrow types have in common: the rules by which columns that differ are brought together.

Only promotions that keep every value as it is are made, and the one that every user of a dataframe takes for granted:
integers beside floats become doubles. Everything else is a conflict. This is stricter than Arrow's own
``promote_options="permissive"``, which makes int64 of uint64 and int64, and binary of text and binary.
"""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pyarrow.types as pt

_UNITS = ("s", "ms", "us", "ns")
_UTC = frozenset({"UTC", "Etc/UTC", "Z", "GMT", "Etc/GMT", "+00:00", "-00:00"})
_SIGNED = {8: pa.int8(), 16: pa.int16(), 32: pa.int32(), 64: pa.int64()}


class TypeConflictError(ValueError):
    """Two types that no common type can hold."""

    def __init__(self, left: pa.DataType, right: pa.DataType, path: tuple[str, ...] = ()) -> None:
        super().__init__(f"{left} and {right} have no common type")
        self.left, self.right = left, right
        self.path = path  # names of nested fields, outermost first; "[]" stands for a list's values


def is_text(kind: pa.DataType) -> bool:
    """Return whether the type is one of the three kinds of string."""
    return bool(pt.is_string(kind) or pt.is_large_string(kind) or pt.is_string_view(kind))


def is_bytes(kind: pa.DataType) -> bool:
    """Return whether the type is one of the kinds of binary."""
    return bool(
        pt.is_binary(kind) or pt.is_large_binary(kind) or pt.is_binary_view(kind) or pt.is_fixed_size_binary(kind)
    )


def is_list(kind: pa.DataType) -> bool:
    """Return whether the type is one of the kinds of list (a map is none)."""
    return bool(
        pt.is_list(kind)
        or pt.is_large_list(kind)
        or pt.is_fixed_size_list(kind)
        or pt.is_list_view(kind)
        or pt.is_large_list_view(kind)
    )


def has_null(kind: pa.DataType) -> bool:
    """Return whether the type is, or holds, the null type (or a struct without fields, from empty dicts only)."""
    if pt.is_null(kind):
        return True
    if is_list(kind):
        return has_null(kind.value_type)
    if pt.is_map(kind):
        return has_null(kind.key_type) or has_null(kind.item_type)
    if pt.is_struct(kind):
        return kind.num_fields == 0 or any(has_null(field.type) for field in kind)
    if pt.is_dictionary(kind) or pt.is_run_end_encoded(kind):
        return has_null(kind.value_type)
    return False


def join(left: pa.DataType, right: pa.DataType) -> pa.DataType:
    """Return the narrowest type that holds the values of both, or raise :class:`TypeConflictError`."""
    if left.equals(right) or pt.is_null(right):
        return left
    if pt.is_null(left):
        return right
    left, right = _decoded(left, right), _decoded(right, left)
    if left.equals(right):
        return left
    for rule in _RULES:
        joined = rule(left, right)
        if joined is not None:
            return joined
    raise TypeConflictError(left, right)


def join_fields(left: pa.Field, right: pa.Field) -> pa.Field:
    """Join two fields of one name; conflicts carry the name in their path."""
    try:
        kind = join(left.type, right.type)
    except TypeConflictError as conflict:
        raise TypeConflictError(conflict.left, conflict.right, (left.name, *conflict.path)) from None
    return pa.field(left.name, kind, left.nullable or right.nullable)


def plain(kind: pa.DataType) -> pa.DataType:
    """Return the type that every reader of the output understands for the same values.

    The kinds of string become ``string``, those of list ``list``, dictionaries and extension types what they stand for,
    half floats single ones. Nothing of it depends on which library the values came from.
    """
    if pt.is_null(kind) or pt.is_boolean(kind):
        return kind
    if is_text(kind):
        return pa.string()
    if pt.is_large_binary(kind) or pt.is_binary_view(kind):
        return pa.binary()
    if pt.is_dictionary(kind) or pt.is_run_end_encoded(kind):
        return plain(kind.value_type)
    if isinstance(kind, pa.BaseExtensionType):
        return pa.bool_() if kind.extension_name == "arrow.bool8" else plain(kind.storage_type)
    if pt.is_fixed_size_list(kind):
        return pa.list_(plain(kind.value_type), kind.list_size)
    if is_list(kind):
        return pa.list_(plain(kind.value_type))
    if pt.is_map(kind):
        return pa.map_(plain(kind.key_type), plain(kind.item_type))
    if pt.is_struct(kind):
        return pa.struct([(field.name, plain(field.type)) for field in kind])
    if pt.is_float16(kind):
        return pa.float32()
    if pt.is_date64(kind):
        return pa.date32()
    if pt.is_decimal(kind) and kind.bit_width < 128:
        return pa.decimal128(kind.precision, kind.scale)
    return kind


# Rules: each returns a type, None where it does not apply, or raises where something inside conflicts. ---------------


def _decoded(kind: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Look through encodings, and through an extension type that meets its own storage type."""
    if pt.is_dictionary(kind) or pt.is_run_end_encoded(kind):
        return kind.value_type
    if isinstance(kind, pa.BaseExtensionType) and not isinstance(other, pa.BaseExtensionType):
        return kind.storage_type
    return kind


def _join_numbers(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    if pt.is_integer(left) and pt.is_integer(right):
        signed_left, signed_right = pt.is_signed_integer(left), pt.is_signed_integer(right)
        if signed_left == signed_right:
            return left if left.bit_width >= right.bit_width else right
        signed, unsigned = (left, right) if signed_left else (right, left)
        return _SIGNED.get(max(signed.bit_width, 2 * unsigned.bit_width))  # none beside uint64
    if pt.is_floating(left) and pt.is_floating(right):
        return left if left.bit_width >= right.bit_width else right
    if {pt.is_integer(left), pt.is_floating(left)} == {pt.is_integer(right), pt.is_floating(right)} == {True, False}:
        return pa.float64()
    return None


def _join_decimals(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    if not (pt.is_decimal(left) or pt.is_decimal(right)):
        return None
    if not all(pt.is_decimal(kind) or pt.is_integer(kind) for kind in (left, right)):
        return None
    (whole_left, scale_left), (whole_right, scale_right) = _digits(left), _digits(right)
    scale = max(scale_left, scale_right)
    precision = max(whole_left, whole_right) + scale
    if precision > 76:
        return None
    wide = precision > 38 or pt.is_decimal256(left) or pt.is_decimal256(right)
    return pa.decimal256(precision, scale) if wide else pa.decimal128(precision, scale)


def _digits(kind: pa.DataType) -> tuple[int, int]:
    """Return how many digits stand before and after the point."""
    if pt.is_decimal(kind):
        return kind.precision - kind.scale, kind.scale
    largest = 2 ** (kind.bit_width - pt.is_signed_integer(kind))
    return len(str(largest)), 0


def _join_text(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    if is_text(left) and is_text(right):
        return pa.large_string() if pt.is_large_string(left) or pt.is_large_string(right) else pa.string()
    if is_bytes(left) and is_bytes(right):
        return pa.large_binary() if pt.is_large_binary(left) or pt.is_large_binary(right) else pa.binary()
    return None


def _join_times(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    if pt.is_date(left) and pt.is_date(right):
        return pa.date32()
    if pt.is_time(left) and pt.is_time(right):
        unit = _finer(left.unit, right.unit)
        return pa.time64(unit) if unit in ("us", "ns") else pa.time32(unit)
    if pt.is_duration(left) and pt.is_duration(right):
        return pa.duration(_finer(left.unit, right.unit))
    if pt.is_timestamp(left) and pt.is_timestamp(right):
        if left.tz != right.tz and not (left.tz in _UTC and right.tz in _UTC):
            return None
        return pa.timestamp(_finer(left.unit, right.unit), left.tz if left.tz == right.tz else "UTC")
    return None


def _finer(left: str, right: str) -> str:
    return max(left, right, key=_UNITS.index)


def _join_nested(left: pa.DataType, right: pa.DataType) -> pa.DataType | None:
    if is_list(left) and is_list(right):
        return _join_lists(left, right)
    if pt.is_map(left) and pt.is_map(right):
        return pa.map_(join(left.key_type, right.key_type), join(left.item_type, right.item_type))
    if pt.is_struct(left) and pt.is_struct(right):
        return _join_structs(left, right)
    return None


def _join_lists(left: pa.DataType, right: pa.DataType) -> pa.DataType:
    try:
        value = join(left.value_type, right.value_type)
    except TypeConflictError as conflict:
        raise TypeConflictError(conflict.left, conflict.right, ("[]", *conflict.path)) from None
    fixed_left, fixed_right = pt.is_fixed_size_list(left), pt.is_fixed_size_list(right)
    if fixed_left and fixed_right and left.list_size == right.list_size:
        return pa.list_(value, left.list_size)
    large = any(pt.is_large_list(kind) or pt.is_large_list_view(kind) for kind in (left, right))
    return pa.large_list(value) if large else pa.list_(value)


def _join_structs(left: pa.DataType, right: pa.DataType) -> pa.DataType:
    fields = {field.name: field for field in left}
    others = {field.name: field for field in right}
    if len(fields) < left.num_fields or len(others) < right.num_fields:
        raise TypeConflictError(left, right)  # a name that occurs twice has no one counterpart
    for name, field in fields.items():
        fields[name] = join_fields(field, others[name]) if name in others else field.with_nullable(True)
    for name, field in others.items():
        fields.setdefault(name, field.with_nullable(True))
    return pa.struct(list(fields.values()))


_RULES: tuple[Callable[[pa.DataType, pa.DataType], pa.DataType | None], ...] = (
    _join_numbers,
    _join_decimals,
    _join_text,
    _join_times,
    _join_nested,
)
