"""A model's signature: the tensors that it takes and returns, and inputs converted to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cortex_dask.errors import InputError

_MOST_NAMES = 20  # names in a message


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input or output of a signature."""

    name: str
    dtype: np.dtype[Any]  # object: byte strings of any length
    shape: tuple[int | None, ...] | None  # None in it: any length; None: of any rank

    def __str__(self) -> str:
        shape = "of any shape" if self.shape is None else _shape(self.shape)
        return f"{self.name}: {_type(self.dtype)} {shape}"

    def convert(self, value: Any, model: str) -> np.ndarray[Any, Any]:
        """Return a value as an array of this type and shape, or raise InputError.

        Numbers are converted where that keeps their kind: integers to any integers that hold them and to floating
        point, floating point to another precision. Never floating point to integers, or numbers to text.
        """
        try:
            array = _array(value, text=self.dtype.kind == "O")
        except ValueError:
            raise self._mismatch(model, "its parts differ in shape") from None
        converted = self._to_bytes(array, model) if self.dtype.kind == "O" else self._to_numbers(array, model)
        if self.shape is not None and not _matches(converted.shape, self.shape):
            raise self._mismatch(model, f"found the shape {_shape(converted.shape)}")
        return converted

    def _to_bytes(self, array: np.ndarray[Any, Any], model: str) -> np.ndarray[Any, Any]:
        if array.dtype.kind == "S":
            return array.astype(object)
        if array.dtype.kind not in "UOT" and array.size:
            raise self._mismatch(model, f"found {_type(array.dtype)}")
        encoded = np.empty(array.shape, dtype=object)
        for index, item in enumerate(array.flat):
            if not isinstance(item, str | bytes):
                raise self._mismatch(model, f"found a value of type {type(item).__name__} at position {index}")
            encoded.flat[index] = item.encode() if isinstance(item, str) else item
        return encoded

    def _to_numbers(self, array: np.ndarray[Any, Any], model: str) -> np.ndarray[Any, Any]:
        if array.dtype == self.dtype:
            return array
        if not array.size:
            return array.astype(self.dtype)
        found, wanted = array.dtype, self.dtype
        if found.kind == "O":
            kinds = sorted({type(item).__name__ for item in array.flat})
            raise self._mismatch(model, f"found values of the types {', '.join(kinds[:_MOST_NAMES])}")
        both_integers = found.kind in "iu" and wanted.kind in "iu"
        if not (both_integers or np.can_cast(found, wanted, "same_kind")):
            raise self._mismatch(model, f"found {_type(found)}")
        if both_integers:
            limits = np.iinfo(wanted)
            low, high = int(array.min()), int(array.max())
            if low < limits.min or high > limits.max:
                raise self._mismatch(model, f"found {low if low < limits.min else high}, which {wanted} cannot hold")
        try:
            with np.errstate(over="raise"):
                return array.astype(wanted)
        except FloatingPointError:
            raise self._mismatch(model, f"found {_type(found)} values too large for {wanted}") from None

    def _mismatch(self, model: str, found: str) -> InputError:
        return InputError(f"{model} does not take this for its input {self.name}: {found}; it takes {self}")


@dataclass(frozen=True, slots=True)
class ModelSignature:
    """One function of a model: tensors in, tensors out."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def convert(self, model_input: Any, model: str) -> dict[str, np.ndarray[Any, Any]]:
        """Return one array for each input of the signature, or raise InputError; messages name the model so."""
        if not isinstance(model_input, Mapping):
            raise InputError(
                f"{model} takes a dict of arrays, not a value of type {type(model_input).__name__}; {self._expected()}"
            )
        names = [tensor.name for tensor in self.inputs]
        if unknown := [str(name) for name in model_input if name not in names]:
            raise InputError(f"{model} has no input {', '.join(unknown)}; {self._expected()}")
        if missing := [name for name in names if name not in model_input]:
            raise InputError(f"{model} lacks the input {', '.join(missing)}; {self._expected()}")
        return {tensor.name: tensor.convert(model_input[tensor.name], model) for tensor in self.inputs}

    def _expected(self) -> str:
        return f"its signature {self.name} takes {'; '.join(map(str, self.inputs)) or 'nothing'}"


def choose_signature(names: Iterable[str], key: str | None, model: str) -> str:
    """Return the signature to run, or raise InputError: the configured one, or the only one."""
    known = sorted(names)
    if not known:
        raise InputError(f"{model} has no signature; save it with one, for instance with model.export() of Keras")
    if key is None:
        if len(known) > 1:
            raise InputError(f"{model} has the signatures {name_list(known)}; choose one with models.signature_key")
        return known[0]
    if key not in known:
        raise InputError(
            f"{model} has no signature {key!r}, which models.signature_key asks for; it has {name_list(known)}"
        )
    return key


def name_list(names: Iterable[str]) -> str:
    """Return names for a message, the first twenty of them."""
    known = list(names)
    more = f" and {len(known) - _MOST_NAMES:,} more" if len(known) > _MOST_NAMES else ""
    return (", ".join(known[:_MOST_NAMES]) + more) or "none"


def _array(value: Any, *, text: bool) -> np.ndarray[Any, Any]:
    """Return a value as an array; a column whose values are arrays or lists becomes one array of them all."""
    # NumPy's own types for text would cut zeros off the end of bytes, and read bytes among text as ASCII.
    array = np.array(value, dtype=object) if text and isinstance(value, list | tuple) else np.asarray(value)
    if array.dtype.kind != "O" or not array.size:
        return array
    if all(isinstance(item, np.ndarray | list | tuple) for item in array.flat):
        parts = [_array(item, text=text) for item in array.flat]
        if len({part.shape for part in parts}) > 1:
            raise ValueError("parts of several shapes")
        return np.stack(parts).reshape(array.shape + parts[0].shape)
    if not text and all(isinstance(item, int | float | np.number) for item in array.flat):
        return np.array(array.tolist())  # numbers that a column of mixed values has kept as objects
    return array


def _matches(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        length is None or length == found for found, length in zip(shape, wanted, strict=True)
    )


def _shape(shape: tuple[int | None, ...]) -> str:
    lengths = ["?" if length is None else str(length) for length in shape]
    return f"({', '.join(lengths)}{',' if len(lengths) == 1 else ''})"


def _type(dtype: np.dtype[Any]) -> str:
    return "text" if dtype.kind in "OSUT" else str(dtype)
