"""The options of a new cluster at a Dask Gateway, from what a job needs and what the site offers.

`choose_options` is a pure function: it is given the site's options, the options that were requested by name, and the
needs that follow from ``compute`` and ``handler``. Sites name their options as they like, and count in units of their
own, so usual names and units are recognised; ``gateway.options`` of the environment names all others.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from cortex_dask.errors import SpecError
from cortex_dask.formatting import nearest, shown
from cortex_dask.spec.quantity import parse_bytes, parse_quantity

Need = Literal["cpu", "memory", "gpu", "image", "env", "threads", "idle_timeout"]

#: The usual names of options; the first one that a site has, with an accepted kind, is used.
USUAL_NAMES: dict[Need, tuple[str, ...]] = {
    "cpu": ("worker_cores", "worker_cpu", "worker_cpus", "cores", "cpus", "cpu", "num_cpus", "cores_per_worker"),
    "memory": ("worker_memory", "worker_mem", "memory", "mem", "memory_per_worker"),
    "gpu": ("worker_gpus", "worker_gpu", "gpus", "gpu", "num_gpus", "gpus_per_worker"),
    "image": ("image", "worker_image", "docker_image", "container_image"),
    "env": ("environment", "env", "environment_variables", "worker_environment", "env_vars"),
    "threads": ("worker_threads", "threads_per_worker", "threads", "nthreads"),
    "idle_timeout": ("idle_timeout", "cluster_idle_timeout", "idle_timeout_seconds"),
}
#: An ``environment`` that is text, for instance, is the name of a conda environment and not a mapping of variables.
_ACCEPTED_KINDS: dict[Need, tuple[str, ...]] = {
    "cpu": ("int", "float", "string", "select"),
    "memory": ("int", "float", "string", "select"),
    "gpu": ("int", "float", "bool", "string", "select"),
    "image": ("string", "select"),
    "env": ("mapping",),
    "threads": ("int", "float"),
    "idle_timeout": ("int", "float"),
}
#: The keys of a job from which the needs follow, for messages.
_SOURCES: dict[Need, str] = {
    "cpu": "compute.cpu",
    "memory": "compute.mem",
    "gpu": "compute.gpu",
    "image": "handler.image",
    "env": "handler.env",
    "threads": "compute.cpu",
    "idle_timeout": "idle_timeout",
}
#: Memory of the Dask worker beside its handler processes: so that a handler at its limit is ended by its supervisor,
#: which knows the batch, and not by the kernel with the whole worker.
_WORKER_BYTES = 256 << 20
_UNIT = re.compile(r"(?<![a-z])(bytes|[kmgt]i?b)(?![a-z])", re.IGNORECASE)
_QUANTITY = re.compile(r"\s*[0-9.]+\s*([KMGT]i?)?(B?)\s*")
_PERIODS = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}
_MIN_AS_BYTES = 1 << 24  # a default of this many and more counts bytes: no worker has as many MiB
_MAX_AS_GIB = 256  # a default up to this counts GiB
_KIND_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "string": "text",
    "bool": "true or false",
    "select": "one of several",
    "mapping": "a mapping",
}
_BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


# what a site offers ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SiteOption:
    """An option that a site has for its clusters."""

    name: str
    kind: str  # int, float, string, bool, select or mapping; another word for a kind that was added later
    default: Any = None  # the site's, or that of gateway.cluster.options in Dask's configuration
    label: str = ""  # the site's, for people
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()  # of a select

    @classmethod
    def read_all(cls, options: Any) -> dict[str, Self]:
        """Return the result of ``dask_gateway.Gateway.cluster_options`` by name, in the site's order."""
        # Names and values are public, kinds and ranges are not: if a later release keeps them elsewhere, messages get
        # poorer, and it is the server that refuses values out of range.
        fields = getattr(options, "_fields", {})
        return {name: cls._read_one(name, options[name], fields.get(name)) for name in options}

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
        """The values that it accepts, in words."""
        if self.kind == "select":
            return f"one of {', '.join(self.choices)}"
        words = _KIND_WORDS.get(self.kind, f"a value of kind {self.kind}")
        if self.low is not None and self.high is not None:
            return f"{words} from {self.low:g} to {self.high:g}"
        if self.low is not None:
            return f"{words} from {self.low:g} on"
        if self.high is not None:
            return f"{words} up to {self.high:g}"
        return words

    def describe(self) -> str:
        """Return the option as part of a sentence: ``worker_cores (a whole number from 1 to 4)``."""
        return f"{self.name} ({self.allowed})"

    def convert(self, value: Any, subject: str) -> Any:
        """Return a value in the option's type, or raise SpecError; ``subject`` begins its message.

        Options of the command line are JSON if they can be, so text may arrive as a number.
        """
        converted = self._typed(value)
        if converted is None or not self._in_range(converted):
            raise SpecError(
                f"{subject}: found {shown(value)}, but the gateway's option {self.name} allows {self.allowed}"
            )
        return converted

    def _typed(self, value: Any) -> Any:
        """Return the value in the option's type, or None if it cannot be converted."""
        match self.kind:
            case "int" | "float":
                return self._number(value)
            case "bool":
                return value if isinstance(value, bool) else _BOOLEANS.get(str(value).strip().lower())
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


def find_option(site: Mapping[str, SiteOption], name: str, subject: str) -> SiteOption:
    """Return the option of this name, or raise SpecError with a list of those that the site has."""
    if name in site:
        return site[name]
    near = nearest(name, site)
    hint = f"did you mean {near}? It" if near else "it"
    raise SpecError(f"{subject}: the gateway has no option {name}; {hint} has {list_options(site)}")


def list_options(site: Mapping[str, SiteOption]) -> str:
    """Return the options of a site, with the values that each accepts, as part of a sentence."""
    return "; ".join(option.describe() for option in site.values()) or "no options at all"


def _text(value: Any) -> str | None:
    """Return text as it was written on the command line, where ``profile=1`` becomes a number."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return None


# what a job needs -----------------------------------------------------------------------------------------------------


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
class ChosenOptions:
    """The options of a new cluster."""

    options: dict[str, Any]
    slots: int | None  # of each worker; None: as many as its threads, which are known once it is there
    has_gpus: bool = False  # whether workers will have the needed GPUs, even if they do not report them
    warnings: tuple[str, ...] = ()  # needs of the job for which the site has no option


@dataclass(frozen=True, slots=True)
class _NeedOption:
    """The site's option for a need."""

    option: SiteOption
    unit: str | None = None


def choose_options(
    site: Mapping[str, SiteOption],
    requested: Mapping[str, Any],
    needs: Needs,
    names: Mapping[str, Any] | None = None,
) -> ChosenOptions:
    """Return the options of a cluster; ``requested`` ones, by the site's names, take precedence over the needs.

    ``names`` is ``gateway.options`` of the environment: for each need the site's name of the option, or
    ``{option: name, unit: GiB}``, or null if nothing shall follow from the need. Raises SpecError for names that the
    site does not have, and values that it refuses.
    """
    by_need = _options_by_need(site, names or {})
    options = _convert_requested(site, requested, by_need.get("memory"))
    slots = _slots_per_worker(by_need, options, needs)
    wanted: dict[Need, Any] = {
        "cpu": _cores_per_worker(by_need, needs, slots),
        "threads": slots if slots and (needs.cpu or needs.gpu) else None,
        "memory": needs.memory and needs.memory * (slots or 1),
        "gpu": needs.gpu and max(1, math.ceil(needs.gpu * (slots or 1))),
        "image": needs.image,
        "env": dict(needs.env) or None,
        "idle_timeout": needs.idle_timeout,
    }
    # Null for gpu means that the site's workers have GPUs by an option of another kind: a profile, a queue.
    has_gpus = bool(needs.gpu) and ("gpu" in by_need or "gpu" in (names or {}))
    warnings = []
    for need, value in wanted.items():
        if not value:
            continue
        found = by_need.get(need)
        if found is None:
            if need in ("memory", "image") or (need == "gpu" and not has_gpus):
                warnings.append(
                    f"{_SOURCES[need]} is said, and the gateway has no option that fits; it has {list_options(site)}"
                )
        elif need == "env":
            name = found.option.name
            options[name] = {**value, **options.get(name, found.option.default or {})}
        elif found.option.name not in options:
            options[found.option.name] = _convert_need(need, value, found)
    return ChosenOptions(options, slots, has_gpus, tuple(warnings))


# the options for the needs, and those requested by name ---------------------------------------------------------------


def _options_by_need(site: Mapping[str, SiteOption], names: Mapping[str, Any]) -> dict[Need, _NeedOption]:
    for key in names:
        if key not in USUAL_NAMES:
            near = nearest(key, USUAL_NAMES)
            raise SpecError(
                f"gateway.options: found the key {key}{f'; did you mean {near}?' if near else ''}; allowed are "
                f"{', '.join(USUAL_NAMES)}"
            )
    found: dict[Need, _NeedOption] = {}
    for need, usual in USUAL_NAMES.items():
        if need in names:
            option = _configured_option(site, need, names[need])
        else:
            matching = (site[name] for name in usual if name in site and site[name].kind in _ACCEPTED_KINDS[need])
            option = next((_NeedOption(option) for option in matching), None)
        if option is not None:
            found[need] = option
    return found


def _configured_option(site: Mapping[str, SiteOption], need: Need, value: Any) -> _NeedOption | None:
    """Return the option that the environment names for a need."""
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
    if option.kind not in _ACCEPTED_KINDS[need]:
        raise SpecError(f"{where}: the gateway's option {option.name} is {option.allowed}, which cannot say the {need}")
    return _NeedOption(option, None if unit is None else str(unit))


def _convert_requested(
    site: Mapping[str, SiteOption], requested: Mapping[str, Any], memory: _NeedOption | None
) -> dict[str, Any]:
    """Return the options that were requested by name, in the types of the site."""
    options = {}
    for name, value in requested.items():
        subject = f"cluster option {name}"
        option = find_option(site, name, subject)
        if memory is not None and memory.option.name == name and option.kind in ("int", "float"):
            value = _requested_memory(value, memory)
        options[name] = option.convert(value, subject)
    return options


def _requested_memory(value: Any, memory: _NeedOption) -> Any:
    """Return a quantity such as ``8Gi`` in the unit of the site; a bare number is in that unit already."""
    if isinstance(value, str) and value.strip()[-1:].isalpha():
        try:
            return _in_unit(parse_bytes(value), memory)
        except ValueError:
            return value  # refused with a sentence by the option itself
    return value


# how many slots -----------------------------------------------------------------------------------------------------


def _slots_per_worker(by_need: Mapping[Need, _NeedOption], options: Mapping[str, Any], needs: Needs) -> int | None:
    """Return how many slots a worker has; None if neither the job nor the site determines it."""
    cores, devices, threads = (_requested_number(by_need, options, need) for need in ("cpu", "gpu", "threads"))
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
    default = by_need["cpu"].option.default if "cpu" in by_need else None
    return max(1, int(default)) if isinstance(default, int | float) and not isinstance(default, bool) else None


def _requested_number(by_need: Mapping[Need, _NeedOption], options: Mapping[str, Any], need: Need) -> float | None:
    """Return the number that was requested by name for a need."""
    value = options.get(by_need[need].option.name) if need in by_need else None
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError):
        return None


def _cores_per_worker(by_need: Mapping[Need, _NeedOption], needs: Needs, slots: int | None) -> int | None:
    """Return how many cores a worker needs; None for the site's default."""
    if needs.cpu is None and (slots is None or slots == 1 or not needs.gpu):
        return None
    cores = max(1, math.ceil((needs.cpu or 1) * (slots or 1)))
    # Each slot is a thread, and a gateway gives a worker as many threads as cores unless the site has an option for it.
    return cores if "threads" in by_need else max(cores, slots or 1)


# units --------------------------------------------------------------------------------------------------------------


def _convert_need(need: Need, value: Any, found: _NeedOption) -> Any:
    """Return the value of a need in the type and the unit of the site's option."""
    option, source = found.option, _SOURCES[need]
    match need:
        case "memory":
            return _convert_memory(int(value), found)
        case "gpu" if option.kind == "bool":
            return True
        case "idle_timeout":
            return _convert_idle_timeout(float(value), found)
        case "cpu" | "gpu" if option.kind == "select":
            return _smallest_choice(float(value), option, source, lambda text: float(parse_quantity(text)))
    return option.convert(value, source)


def _convert_memory(needed: int, found: _NeedOption) -> Any:
    option, source = found.option, _SOURCES["memory"]
    with_worker = needed + _WORKER_BYTES
    if option.kind == "select":
        return _smallest_choice(needed, option, source, _parse_bytes)
    if option.kind == "string":
        return _quantity_text(with_worker, option)
    value = max(_in_unit(with_worker, found), option.low or 0)
    if option.high is not None and _in_unit(needed, found) <= option.high < value:
        value = option.high  # less for the Dask worker, rather than refusing a job that fits exactly
    return option.convert(value, source)


def _in_unit(count: int, found: _NeedOption) -> int | float:
    """Return a number of bytes in the unit of the site, rounded up if it takes whole numbers only."""
    unit = _memory_unit(found)
    size = 1 if unit.lower() == "bytes" else _parse_bytes(f"1{unit}")
    exact = count / size
    return math.ceil(exact - 1e-9) if found.option.kind == "int" else round(exact, 6)


def _memory_unit(found: _NeedOption) -> str:
    """Return the unit of the site's memory option: the configured one, or that of its label, or of its default."""
    option = found.option
    if found.unit is not None:
        if not _UNIT.fullmatch(found.unit):
            raise SpecError(
                f"gateway.options.memory: found the unit {shown(found.unit)}; allowed are bytes, MiB, MB, GiB, GB, "
                "TiB and TB"
            )
        return found.unit
    labelled = _UNIT.search(option.label)
    if labelled:
        return labelled[1]
    default = option.default if isinstance(option.default, int | float) else 0
    if max(default, option.high or 0) >= _MIN_AS_BYTES:
        return "bytes"
    if default <= _MAX_AS_GIB:
        return "GiB"
    raise SpecError(
        f"compute.mem: the gateway's option {option.name} does not say its unit, and its default {default:g} is "
        f"neither GiB nor bytes; say in the environment's gateway.options: memory: {{option: {option.name}, unit: MiB}}"
    )


def _parse_bytes(text: str) -> float:
    """Return the bytes of ``8``, ``8G``, ``8 GiB``, or ``8GB``."""
    plain = re.sub(r"\s+|[bB]\s*$", "", text)
    plain = re.sub(r"[kmgt]i?$", lambda match: match[0][0].upper() + match[0][1:], plain)
    return float(parse_quantity(plain))


def _quantity_text(count: int, option: SiteOption) -> str:
    """Return a quantity in the form of the site's default: ``2 G``, ``2GiB``, ``2147483648``."""
    default = str(option.default or "").strip()
    match = _QUANTITY.fullmatch(default)
    suffix = (match[1] or "", match[2]) if match else ("Gi", "")
    if not suffix[0]:
        return str(count)
    # A bare G means 2**30 to some and 10**9 to others; counted in the smaller unit, no job gets less than it needs.
    size = float(parse_quantity(f"1{suffix[0]}"))
    return f"{math.ceil(count / size * 1000) / 1000:g}{suffix[0]}{suffix[1]}"


def _smallest_choice(needed: float, option: SiteOption, source: str, parse: Callable[[str], float]) -> str:
    """Return the smallest sufficient choice."""
    sized = []
    for choice in option.choices:
        try:
            sized.append((parse(choice), choice))
        except ValueError:
            continue  # "large", for instance
    sufficient = [item for item in sized if item[0] >= needed]
    if not sufficient:
        raise SpecError(
            f"{source}: {needed:g} is needed, but the gateway's option {option.name} allows {option.allowed}; choose "
            f"one with --cluster-option {option.name}=…"
        )
    return min(sufficient)[1]


def _convert_idle_timeout(seconds: float, found: _NeedOption) -> Any:
    option = found.option
    unit = found.unit or next((word for word in _PERIODS if word.rstrip("s") in option.label.lower()), "seconds")
    if unit not in _PERIODS:
        raise SpecError(
            f"gateway.options.idle_timeout: found the unit {shown(unit)}; allowed are {', '.join(_PERIODS)}"
        )
    value = seconds / _PERIODS[unit]
    if option.low is not None:
        value = max(value, option.low)
    if option.high is not None:
        value = min(value, option.high)
    return option.convert(math.ceil(value) if option.kind == "int" else value, "idle_timeout")
