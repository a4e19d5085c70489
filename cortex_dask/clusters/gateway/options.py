"""From what a job needs to the options of a Dask Gateway, whatever the site calls them and in whatever unit it counts.

A pure function, :func:`choose`: the site's options, what was asked for by name, and what follows from ``compute`` and
``handler`` go in; the options for the new cluster come out, with the number of slots that each of its workers has.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from cortex_dask.errors import SpecError
from cortex_dask.formatting import nearest, shown
from cortex_dask.spec.quantity import parse_bytes, parse_quantity

Need = Literal["cpu", "memory", "gpu", "image", "env", "threads", "idle_timeout"]

#: What sites usually call their options; the first that a site has, and whose kind fits, is used.
USUAL_NAMES: dict[Need, tuple[str, ...]] = {
    "cpu": ("worker_cores", "worker_cpu", "worker_cpus", "cores", "cpus", "cpu", "num_cpus", "cores_per_worker"),
    "memory": ("worker_memory", "worker_mem", "memory", "mem", "memory_per_worker"),
    "gpu": ("worker_gpus", "worker_gpu", "gpus", "gpu", "num_gpus", "gpus_per_worker"),
    "image": ("image", "worker_image", "docker_image", "container_image"),
    "env": ("environment", "env", "environment_variables", "worker_environment", "env_vars"),
    "threads": ("worker_threads", "threads_per_worker", "threads", "nthreads"),
    "idle_timeout": ("idle_timeout", "cluster_idle_timeout", "idle_timeout_seconds"),
}
#: An ``environment`` that is text is the name of a conda environment, and none of variables; and so on.
_NEED_KINDS: dict[Need, tuple[str, ...]] = {
    "cpu": ("int", "float", "string", "select"),
    "memory": ("int", "float", "string", "select"),
    "gpu": ("int", "float", "bool", "string", "select"),
    "image": ("string", "select"),
    "env": ("mapping",),
    "threads": ("int", "float"),
    "idle_timeout": ("int", "float"),
}
#: A worker's own process, beside its handlers: so that a handler at its limit is ended by its supervisor, who knows
#: the batch, and not by the kernel with the whole worker.
_WORKER_BYTES = 256 << 20
_UNIT = re.compile(r"(?<![a-z])(bytes|[kmgt]i?b)(?![a-z])", re.IGNORECASE)
_QUANTITY = re.compile(r"\s*[0-9.]+\s*([KMGT]i?)?(B?)\s*")
_PERIODS = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}
_BYTES_FROM = 1 << 24  # a default of this many and more counts bytes: no worker has as many MiB
_GIB_TO = 256  # and one up to this counts GiB


@dataclass(frozen=True, slots=True)
class Needs:
    """What a job needs of each slot, and of its cluster."""

    cpu: float | None = None
    memory: int | None = None  # bytes
    gpu: float = 0.0
    image: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    idle_timeout: float | None = None  # seconds


@dataclass(frozen=True, slots=True)
class Choice:
    """The options for a new cluster."""

    options: dict[str, Any]
    slots: int | None  # of each worker; None: as many as it turns out to have threads
    has_gpus: bool = False  # whether workers will have the GPUs that are needed, though they may not say so
    notes: tuple[str, ...] = ()  # what the job needs and the site has no option for


@dataclass(frozen=True, slots=True)
class _Target:
    """The site's option for a need."""

    option: SiteOption
    unit: str | None = None


def choose(
    site: Mapping[str, SiteOption], asked: Mapping[str, Any], needs: Needs, names: Mapping[str, Any] | None = None
) -> Choice:
    """Return the options for a cluster.

    Parameters
    ----------
    site : mapping
        The options that the site has, by name.
    asked : mapping
        Options by the site's own names, as ``--cluster-option`` gives them: they win over what follows from the needs.
    needs : Needs
        What follows from ``compute``, ``handler`` and the job.
    names : mapping, optional
        The environment's ``gateway.options``: for each of ``cpu``, ``memory``, ``gpu``, ``image``, ``env``,
        ``threads`` and ``idle_timeout`` the site's name of it, or ``{option: name, unit: GiB}``, or null where nothing
        shall follow from it.

    Returns
    -------
    Choice
        With a note for each need that the site has no option for.

    Raises
    ------
    SpecError
        If something was asked for, or is mapped, that the site does not have, or a value is refused.
    """
    targets = _targets(site, names or {})
    options = _asked(site, asked, targets.get("memory"))
    notes: list[str] = []
    slots = _slots(targets, options, needs)
    wanted: dict[Need, Any] = {
        "cpu": _cores(targets, needs, slots),
        "threads": slots if slots and (needs.cpu or needs.gpu) else None,
        "memory": needs.memory and needs.memory * (slots or 1),
        "gpu": needs.gpu and max(1, math.ceil(needs.gpu * (slots or 1))),
        "image": needs.image,
        "env": dict(needs.env) or None,
        "idle_timeout": needs.idle_timeout,
    }
    for need, value in wanted.items():
        if not value:
            continue
        target = targets.get(need)
        if target is None:
            if need in ("memory", "gpu", "image"):
                notes.append(
                    f"{_SAID[need]} is said, and the gateway has no option that fits; it has {list_options(site)}"
                )
        elif need == "env":
            name = target.option.name
            base = options.get(name, target.option.default or {})
            options[name] = {**value, **base}
        elif target.option.name not in options:
            options[target.option.name] = _converted(need, value, target)
    # Null says that the site's workers have them, by an option of another kind: a profile, a queue.
    has_gpus = bool(needs.gpu) and ("gpu" in targets or "gpu" in (names or {}))
    return Choice(options, slots, has_gpus, tuple(n for n in notes if not (has_gpus and n.startswith(_SAID["gpu"]))))


_SAID: dict[Need, str] = {
    "cpu": "compute.cpu",
    "memory": "compute.mem",
    "gpu": "compute.gpu",
    "image": "handler.image",
    "env": "handler.env",
    "threads": "compute.cpu",
    "idle_timeout": "idle_timeout",
}


# finding ------------------------------------------------------------------------------------------------------------


def _targets(site: Mapping[str, SiteOption], names: Mapping[str, Any]) -> dict[Need, _Target]:
    for key in names:
        if key not in USUAL_NAMES:
            near = nearest(key, USUAL_NAMES)
            raise SpecError(
                f"gateway.options: found the key {key}{f'; did you mean {near}?' if near else ''}; allowed are "
                f"{', '.join(USUAL_NAMES)}"
            )
    found: dict[Need, _Target] = {}
    for need, usual in USUAL_NAMES.items():
        if need in names:
            target = _mapped(site, need, names[need])
        else:
            fitting = (site[name] for name in usual if name in site and site[name].kind in _NEED_KINDS[need])
            target = next((_Target(option) for option in fitting), None)
        if target is not None:
            found[need] = target
    return found


def _mapped(site: Mapping[str, SiteOption], need: Need, value: Any) -> _Target | None:
    """Return what the environment's configuration says about a need."""
    where = f"gateway.options.{need}"
    if value is None or value is False:
        return None
    unit = None
    if isinstance(value, Mapping) and set(value) <= {"option", "unit"} and "option" in value:
        value, unit = value["option"], value.get("unit")
    if not isinstance(value, str):
        raise SpecError(
            f"{where}: found {shown(value)}; allowed is the site's name of that option, {{option: name, unit: GiB}}, "
            "or null where nothing shall follow"
        )
    option = find_option(site, value, where)
    if option.kind not in _NEED_KINDS[need]:
        raise SpecError(f"{where}: the gateway's option {option.name} is {option.allowed}, which cannot say the {need}")
    return _Target(option, None if unit is None else str(unit))


def _asked(site: Mapping[str, SiteOption], asked: Mapping[str, Any], memory: _Target | None) -> dict[str, Any]:
    """Return what was asked for by name, checked."""
    options = {}
    for name, value in asked.items():
        said = f"cluster option {name}"
        option = find_option(site, name, said)
        if memory is not None and memory.option.name == name and option.kind in ("int", "float"):
            value = _amount(value, memory)
        options[name] = option.convert(value, said)
    return options


def _amount(value: Any, memory: _Target) -> Any:
    """Return a quantity such as ``8Gi`` in the unit of the site; a bare number is in that unit already."""
    if isinstance(value, str) and value.strip()[-1:].isalpha():
        try:
            return _in_unit(parse_bytes(value), memory)
        except ValueError:
            return value  # refused with a sentence by the option itself
    return value


# how many slots -----------------------------------------------------------------------------------------------------


def _slots(targets: Mapping[Need, _Target], options: Mapping[str, Any], needs: Needs) -> int | None:
    """Return how many slots a worker shall have; None where neither the job nor the site says."""
    said = [_value(targets, options, need) for need in ("cpu", "gpu", "threads")]
    cores, devices, threads = said
    if needs.gpu:
        if devices:
            return max(1, int(devices / needs.gpu + 1e-9))
        return max(1, int(1 / needs.gpu + 1e-9))  # those that share one device
    if threads:
        return max(1, int(threads))
    if cores:
        return max(1, int(cores / (needs.cpu or 1) + 1e-9))
    if needs.cpu:
        return 1
    default = targets["cpu"].option.default if "cpu" in targets else None
    return max(1, int(default)) if isinstance(default, int | float) and not isinstance(default, bool) else None


def _value(targets: Mapping[Need, _Target], options: Mapping[str, Any], need: Need) -> float | None:
    """Return the number that was asked for by name, if that is what a need is called here."""
    value = options.get(targets[need].option.name) if need in targets else None
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None


def _cores(targets: Mapping[Need, _Target], needs: Needs, slots: int | None) -> int | None:
    """Return how many cores a worker needs; None: as many as the site gives."""
    if needs.cpu is None and (slots is None or slots == 1 or not needs.gpu):
        return None
    wanted = max(1, math.ceil((needs.cpu or 1) * (slots or 1)))
    # Each slot is a thread, and a gateway gives a worker as many threads as cores, unless the site says otherwise.
    return max(wanted, slots or 1) if "threads" not in targets else wanted


# units --------------------------------------------------------------------------------------------------------------


def _converted(need: Need, value: Any, target: _Target) -> Any:
    option, said = target.option, _SAID[need]
    match need:
        case "memory":
            return _memory(int(value), target)
        case "gpu" if option.kind == "bool":
            return True
        case "idle_timeout":
            return _idle_timeout(float(value), target)
        case "cpu" | "gpu" if option.kind == "select":
            return _smallest(float(value), option, said, lambda text: float(parse_quantity(text)))
    return option.convert(value, said)


def _memory(wanted: int, target: _Target) -> Any:
    option, said = target.option, "compute.mem"
    roomy = wanted + _WORKER_BYTES
    if option.kind == "select":
        return _smallest(wanted, option, said, _bytes_of)
    if option.kind == "string":
        return _text_like(roomy, option)
    high = option.high
    in_unit, least = _in_unit(roomy, target), _in_unit(wanted, target)
    # The room is a courtesy: it shall not make a job impossible that fits exactly.
    return option.convert(high if high is not None and least <= high < in_unit else max(in_unit, option.low or 0), said)


def _in_unit(count: int, target: _Target) -> int | float:
    """Return a number of bytes in the unit of the site, rounded up where it takes whole numbers only."""
    unit = _unit(target)
    size = 1 if unit.lower() == "bytes" else _bytes_of(f"1{unit}")
    exact = count / size
    return math.ceil(exact - 1e-9) if target.option.kind == "int" else round(exact, 6)


def _unit(target: _Target) -> str:
    """Return the unit of the site's memory option: as configured, as its label says, or as its default tells."""
    option = target.option
    if target.unit is not None:
        if not _UNIT.fullmatch(target.unit):
            raise SpecError(
                f"gateway.options.memory: found the unit {shown(target.unit)}; allowed are bytes, MiB, MB, GiB, GB, "
                "TiB and TB"
            )
        return target.unit
    labelled = _UNIT.search(option.label)
    if labelled:
        return labelled[1]
    default = option.default if isinstance(option.default, int | float) else 0
    if max(default, option.high or 0) >= _BYTES_FROM:
        return "bytes"
    if default <= _GIB_TO:
        return "GiB"
    raise SpecError(
        f"compute.mem: the gateway's option {option.name} does not say its unit, and its default {default:g} is "
        f"neither GiB nor bytes; say in the environment's gateway.options: memory: {{option: {option.name}, unit: MiB}}"
    )


def _bytes_of(text: str) -> float:
    """Return the bytes of ``8``, ``8G``, ``8 GiB``, or ``8GB``."""
    plain = re.sub(r"\s+|[bB]\s*$", "", text)
    plain = re.sub(r"[kmgt]i?$", lambda match: match[0][0].upper() + match[0][1:], plain)
    return float(parse_quantity(plain))


def _text_like(count: int, option: SiteOption) -> str:
    """Return a quantity written as the site writes its default: ``2 G``, ``2GiB``, ``2147483648``."""
    default = str(option.default or "").strip()
    match = _QUANTITY.fullmatch(default)
    suffix = (match[1] or "", match[2]) if match else ("Gi", "")
    if not suffix[0]:
        return str(count)
    # A bare G means 2**30 to some and 10**9 to others: counted in the smaller, so that nobody gets less than needed.
    size = float(parse_quantity(f"1{suffix[0]}"))
    return f"{math.ceil(count / size * 1000) / 1000:g}{suffix[0]}{suffix[1]}"


def _smallest(wanted: float, option: SiteOption, said: str, parse: Any) -> str:
    """Return the smallest of the choices that is enough."""
    sized = []
    for choice in option.choices:
        try:
            sized.append((float(parse(choice)), choice))
        except ValueError:
            continue  # "large": no number to compare with
    enough = [item for item in sized if item[0] >= wanted]
    if not enough:
        raise SpecError(
            f"{said}: {wanted:g} is needed, but the gateway's option {option.name} allows {option.allowed}; choose "
            f"one with --cluster-option {option.name}=…"
        )
    return min(enough)[1]


def _idle_timeout(seconds: float, target: _Target) -> Any:
    option = target.option
    said = target.unit or next((word for word in _PERIODS if word.rstrip("s") in option.label.lower()), "seconds")
    if said not in _PERIODS:
        raise SpecError(
            f"gateway.options.idle_timeout: found the unit {shown(said)}; allowed are {', '.join(_PERIODS)}"
        )
    value = seconds / _PERIODS[said]
    value = max(value, option.low if option.low is not None else value)
    value = min(value, option.high if option.high is not None else value)  # a site may allow less than we wanted
    return option.convert(math.ceil(value) if option.kind == "int" else value, "idle_timeout")


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
