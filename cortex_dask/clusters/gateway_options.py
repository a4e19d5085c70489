"""The options of a Dask Gateway's clusters: what a site offers, read from its server, and whether a value will do.

Every site of Dask Gateway decides for itself which options its users have, and how they are called. A
:class:`SiteOption` is one of them; :mod:`cortex_dask.clusters.gateway_mapping` finds those that a job needs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from cortex_dask.errors import SpecError
from cortex_dask.wording import nearest, shown

__all__ = ["SiteOption", "find_option", "list_options"]

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": "true or false",
    "select": "one of several",
    "mapping": "a mapping",
}
_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True, slots=True)
class SiteOption:
    """An option that a gateway has for its clusters.

    Parameters
    ----------
    name : str
        What the site calls it.
    kind : str
        ``int``, ``float``, ``string``, ``bool``, ``select`` or ``mapping``; another word for a kind that came later.
    default : object, optional
        Its value when nothing is said: the site's, or that of ``gateway.cluster.options`` in Dask's configuration.
    label : str
        What the site shows to people.
    low, high : float, optional
        The range of a number.
    choices : tuple of str
        The values of a ``select``.
    """

    name: str
    kind: str
    default: Any = None
    label: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    @classmethod
    def read(cls, options: Any) -> dict[str, Self]:
        """Read what ``dask_gateway.Gateway.cluster_options`` returned, by name, in the site's order."""
        # The names and values are public, the ranges are not: where a later release keeps them elsewhere, sentences
        # get poorer and the server, which has the last word anyway, refuses what is out of range.
        known = getattr(options, "_fields", {})
        return {name: cls._read_one(name, options[name], known.get(name)) for name in options}

    @classmethod
    def _read_one(cls, name: str, value: Any, field: Any) -> Self:
        kinds = {
            "Integer": "int",
            "Float": "float",
            "String": "string",
            "Bool": "bool",
            "Select": "select",
            "Mapping": "mapping",
        }
        kind = type(field).__name__
        return cls(
            name,
            kinds.get(kind, kind),
            value,
            str(getattr(field, "label", "") or ""),
            getattr(field, "min", None),
            getattr(field, "max", None),
            tuple(getattr(field, "options", ())),
        )

    @property
    def allowed(self) -> str:
        """What values it takes, in words."""
        if self.kind == "select":
            return f"one of {', '.join(self.choices)}"
        words = _KINDS.get(self.kind, f"a value of kind {self.kind}")
        if self.low is not None and self.high is not None:
            return f"{words} from {self.low:g} to {self.high:g}"
        if self.low is not None:
            return f"{words} from {self.low:g} on"
        if self.high is not None:
            return f"{words} up to {self.high:g}"
        return words

    def describe(self) -> str:
        """Return it as part of a sentence: ``worker_cores (a whole number from 1 to 4)``."""
        return f"{self.name} ({self.allowed})"

    def convert(self, value: Any, said: str) -> Any:
        """Return a value as the site takes it.

        Parameters
        ----------
        value : object
            What is wanted. Options of the command line are JSON where they can be, so text may arrive as a number.
        said : str
            Who wants it, to begin the error's sentence with.

        Raises
        ------
        SpecError
            If the site does not take it.
        """
        converted = self._typed(value)
        if converted is None or not self._in_range(converted):
            raise SpecError(f"{said}: found {shown(value)}, but the gateway's option {self.name} allows {self.allowed}")
        return converted

    def _typed(self, value: Any) -> Any:
        """Return the value in the option's type; None where it has none there."""
        match self.kind:
            case "int" | "float":
                return self._number(value)
            case "bool":
                return value if isinstance(value, bool) else _BOOLS.get(str(value).strip().lower())
            case "string":
                return _text(value)
            case "select":
                text = _text(value)
                return text if text in self.choices else None
            case "mapping":
                return dict(value) if isinstance(value, Mapping) else None
        return value

    def _number(self, value: Any) -> int | float | None:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            return None
        try:
            number = float(value)
        except ValueError:
            return None
        if self.kind == "float":
            return number
        return int(number) if number.is_integer() else None

    def _in_range(self, value: Any) -> bool:
        if self.kind not in ("int", "float"):
            return True
        return (self.low is None or value >= self.low) and (self.high is None or value <= self.high)


def find_option(site: Mapping[str, SiteOption], name: str, said: str) -> SiteOption:
    """Return the option of this name.

    Raises
    ------
    SpecError
        If the site has none; the message lists those that it has.
    """
    if name in site:
        return site[name]
    near = nearest(name, site)
    hint = f"did you mean {near}? It" if near else "it"
    raise SpecError(f"{said}: the gateway has no option {name}; {hint} has {list_options(site)}")


def list_options(site: Mapping[str, SiteOption]) -> str:
    """Return the options of a site, with what each allows, as part of a sentence."""
    return "; ".join(option.describe() for option in site.values()) or "no options at all"


def _text(value: Any) -> str | None:
    """Return text as it was written on the command line, where ``profile=1`` becomes a number."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return None
