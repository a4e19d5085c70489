"""What a model's signature takes and returns, and whether an input fits it: the same wherever the model runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from cortex_dask.errors import InputError

_SHOWN = 20  # names in a message


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input or output of a signature."""

    name: str
    dtype: np.dtype[Any]  # object: byte strings of any length
    shape: tuple[int | None, ...] | None  # None in it: any length; None: of any rank

    def __str__(self) -> str:
        shape = "of any shape" if self.shape is None else _shape(self.shape)
        return f"{self.name}: {_type(self.dtype)} {shape}"

    def fit(self, value: Any, model: str) -> np.ndarray[Any, Any]:
        """Return a value as an array of this type.

        Numbers are converted where that keeps their kind: integers to any integers that hold them and to floating
        point, floating point to another precision. Never floating point to integers, or numbers to text.

        Raises
        ------
        InputError
            If the type or the shape is another.
        """
        try:
            array = _array(value, text=self.dtype.kind == "O")
        except ValueError:
            raise self._misfit(model, "its parts differ in shape") from None
        fitted = self._text(array, model) if self.dtype.kind == "O" else self._numbers(array, model)
        if self.shape is not None and not _matches(fitted.shape, self.shape):
            raise self._misfit(model, f"found the shape {_shape(fitted.shape)}")
        return fitted

    def _text(self, array: np.ndarray[Any, Any], model: str) -> np.ndarray[Any, Any]:
        if array.dtype.kind == "S":
            return array.astype(object)
        if array.dtype.kind not in "UOT" and array.size:
            raise self._misfit(model, f"found {_type(array.dtype)}")
        encoded = np.empty(array.shape, dtype=object)
        for index, item in enumerate(array.flat):
            if not isinstance(item, str | bytes):
                raise self._misfit(model, f"found a value of type {type(item).__name__} at position {index}")
            encoded.flat[index] = item.encode() if isinstance(item, str) else item
        return encoded

    def _numbers(self, array: np.ndarray[Any, Any], model: str) -> np.ndarray[Any, Any]:
        if array.dtype == self.dtype:
            return array
        if not array.size:
            return array.astype(self.dtype)
        found, wanted = array.dtype, self.dtype
        if found.kind == "O":
            kinds = sorted({type(item).__name__ for item in array.flat})
            raise self._misfit(model, f"found values of the types {', '.join(kinds[:_SHOWN])}")
        whole = found.kind in "iu" and wanted.kind in "iu"
        if not (whole or np.can_cast(found, wanted, "same_kind")):
            raise self._misfit(model, f"found {_type(found)}")
        if whole:
            limits = np.iinfo(wanted)
            low, high = int(array.min()), int(array.max())
            if low < limits.min or high > limits.max:
                raise self._misfit(model, f"found {low if low < limits.min else high}, which {wanted} cannot hold")
        try:
            with np.errstate(over="raise"):
                return array.astype(wanted)
        except FloatingPointError:
            raise self._misfit(model, f"found {_type(found)} values too large for {wanted}") from None

    def _misfit(self, model: str, found: str) -> InputError:
        return InputError(f"{model} does not take this for its input {self.name}: {found}; it takes {self}")


@dataclass(frozen=True, slots=True)
class ModelSignature:
    """One function of a model: tensors in, tensors out."""

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def fit(self, model_input: Any, model: str) -> dict[str, np.ndarray[Any, Any]]:
        """Return the model's input as arrays, one for each input of the signature.

        Parameters
        ----------
        model_input : mapping
            An array, or what can be made one, for each name.
        model : str
            What the messages call the model.

        Raises
        ------
        InputError
            If a name is unknown or missing, or a value does not fit.
        """
        if not isinstance(model_input, Mapping):
            raise InputError(
                f"{model} takes a dict of arrays, not a value of type {type(model_input).__name__}; {self._takes()}"
            )
        names = [tensor.name for tensor in self.inputs]
        if unknown := [str(name) for name in model_input if name not in names]:
            raise InputError(f"{model} has no input {', '.join(unknown)}; {self._takes()}")
        if missing := [name for name in names if name not in model_input]:
            raise InputError(f"{model} lacks the input {', '.join(missing)}; {self._takes()}")
        return {tensor.name: tensor.fit(model_input[tensor.name], model) for tensor in self.inputs}

    def _takes(self) -> str:
        return f"its signature {self.name} takes {'; '.join(map(str, self.inputs)) or 'nothing'}"


def choose(names: Iterable[str], key: str | None, model: str) -> str:
    """Return the signature to run: the one that is asked for, or the only one.

    Raises
    ------
    InputError
        If the model has no such signature, none at all, or several and none was asked for.
    """
    there = sorted(names)
    if not there:
        raise InputError(f"{model} has no signature; save it with one, for instance with model.export() of Keras")
    if key is None:
        if len(there) > 1:
            raise InputError(f"{model} has the signatures {shown_names(there)}; choose one with models.signature_key")
        return there[0]
    if key not in there:
        raise InputError(
            f"{model} has no signature {key!r}, which models.signature_key asks for; it has {shown_names(there)}"
        )
    return key


def shown_names(names: Iterable[str]) -> str:
    """Return names as a list for a message."""
    there = list(names)
    more = f" and {len(there) - _SHOWN:,} more" if len(there) > _SHOWN else ""
    return (", ".join(there[:_SHOWN]) + more) or "none"


def _array(value: Any, *, text: bool) -> np.ndarray[Any, Any]:
    """Make an array; of a column whose values are arrays or lists, one array of them all."""
    # NumPy's own types for text would cut zeros off the end of bytes, and take bytes among text for ASCII.
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
