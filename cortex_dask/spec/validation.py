"""What is wrong with a document of the user's, in sentences: where, what was found, what is allowed.

Every field of a model says in its ``description`` what is allowed in it, as the end of the sentence "allowed is …".
pydantic finds the mistakes; none of its own words reach the user.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from cortex_dask.errors import SpecError
from cortex_dask.formatting import nearest, shown

_Model = TypeVar("_Model", bound="Document")
#: Keys whose values are shown by their type only: they may hold secrets.
_PRIVATE = ("env", "config", "storage_options")


class Document(BaseModel):
    """The base of all models: unknown keys and wrong types are errors, and ``key: null`` is no key at all."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True, defer_build=True)

    #: Keys that users may write although the model lacks them: they are moved before it looks.
    also_known: ClassVar[tuple[str, ...]] = ()

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, value: Any) -> Any:
        return {key: item for key, item in value.items() if item is not None} if isinstance(value, Mapping) else value


def validate(
    model: type[_Model], value: object, *, source: str = "", prefix: str = "", names: Mapping[str, str] | None = None
) -> _Model:
    """Check a value against a model.

    Parameters
    ----------
    model : type of Document
        What is expected.
    value : object
        What the user gave.
    source : str
        Stands before every message: the file, where there is one.
    prefix : str
        The path of the value in its file.
    names : mapping, optional
        How the user wrote a key, where that is not its path in the model: ``{"dataset.batch_size": "batch_size"}``.

    Raises
    ------
    SpecError
        With a line for each mistake.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        lines = dict.fromkeys(_sentence(model, item, prefix, names or {}) for item in error.errors(include_url=False))
        mistakes = [(path, message) for path, _, message in (line.partition(": ") for line in lines)]
        text = "\n".join(f"{source}: {line}" if source else line for line in lines)
        raise SpecError(text, mistakes=mistakes) from None


def _sentence(model: type[Document], item: Mapping[str, Any], prefix: str, names: Mapping[str, str]) -> str:
    location = tuple(part for part in item["loc"] if part != "[key]")
    path = _path(location)
    path = names.get(path, f"{prefix}.{path}" if prefix and path else prefix or path) or "the document"
    owner, description = _walk(model, location)
    kind, found = item["type"], item["input"]
    if kind == "extra_forbidden":
        known = [*_fields(owner), *owner.also_known] if owner else []
        near = nearest(str(location[-1]), known)
        hint = f"did you mean {near}? " if near else ""
        return f"{path}: unknown key; {hint}known keys are {', '.join(known)}"
    if kind == "missing":
        return f"{path}: is missing; it must be {description}"
    if kind == "value_error":
        return f"{path}: {item['ctx']['error']}"
    if "[key]" in item["loc"] or kind == "invalid_key":
        return f"{path}: found the key {shown(location[-1])}; keys must be text, put it in quotes"
    private = any(part in _PRIVATE for part in location)
    what = f"a value of type {type(found).__name__}" if private else shown(found)
    hint = ""
    if isinstance(found, str) and isinstance(description, _Choices) and (near := nearest(found, description.words)):
        hint = f"; did you mean {near}?"
    return f"{path}: found {what}; allowed is {description}{hint}"


def _path(location: Iterable[object]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _either(words: tuple[str, ...]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


class _Choices(str):
    """The description of a field with fixed words."""

    words: tuple[str, ...] = ()


def _walk(model: type[Document], location: tuple[object, ...]) -> tuple[type[Document] | None, str]:
    """Return the model whose key the last part of a location is, and what is allowed there."""
    owner: type[Document] | None = model
    description = "a mapping"
    current: type[Document] | None = model
    for part in location:
        if isinstance(part, int):  # an entry of the list that the description speaks of
            owner = None
            continue
        if current is None or not isinstance(part, str) or part not in _fields(current):
            owner = current
            continue
        owner, field = current, _fields(current)[part]
        hint = field.annotation
        words = _literals(hint)
        description = _Choices(_either(words)) if words else field.description or "something else"
        if isinstance(description, _Choices):
            description.words = words
        current = _document(hint)
    return owner, description


def _fields(model: type[Document]) -> dict[str, FieldInfo]:
    """Return the model's fields by the keys that users write."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _literals(hint: Any) -> tuple[str, ...]:
    if typing.get_origin(hint) is typing.Literal:
        return tuple(str(item) for item in typing.get_args(hint))
    return next((words for item in typing.get_args(hint) if (words := _literals(item))), ())


def _document(hint: Any) -> type[Document] | None:
    if isinstance(hint, type) and issubclass(hint, Document):
        return hint
    return next((found for item in typing.get_args(hint) if (found := _document(item))), None)
