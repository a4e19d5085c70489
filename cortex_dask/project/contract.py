"""The ``Handler`` class as a contract: its methods, the arguments that they may declare, and how it is loaded.

======================  ========  ================================================================
method                  required  arguments that may be declared
======================  ========  ================================================================
``__init__``            yes       ``config`` (required), ``job_spec``, ``metrics_client``; for
                                  ``type: tensorflow`` also ``tensorflow_client`` (required)
``handle_batch``        yes       ``payload``, ``batch_id``
``on_job_complete``     no        none
======================  ========  ================================================================

Arguments are passed by name, and only those that a method declares. An argument with a default value is an argument
like any other, so an unknown one is rejected. ``*args`` and ``**kwargs`` may stand beside declared arguments (a base
class often has them), but never receive anything; a ``handle_batch`` that declares nothing else is rejected, because it
would never see its batch. That is what a decorator without :func:`functools.wraps` leaves behind.

The handler process imports this module, so it needs the standard library only.
"""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cortex_dask.errors import HandlerError

#: The name that the one class in the handler's file must have.
CLASS_NAME = "Handler"


@dataclass(frozen=True, slots=True)
class HandlerSignature:
    """Which arguments a handler's methods declare: the ones to pass."""

    init: frozenset[str]
    handle_batch: frozenset[str]
    on_job_complete: bool  # whether the class has that method


@dataclass(frozen=True, slots=True)
class _Rule:
    """What the contract says of one method."""

    method: str
    present: bool  # whether the class must have it
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def allowed(self) -> tuple[str, ...]:
        return self.required + self.optional

    def describe(self) -> str:
        """Say what is allowed, in the words of an error message."""
        if not self.allowed:
            return f"{self.method} takes no arguments beside self"
        names = [f"{name} (required)" for name in self.required] + list(self.optional)
        return f"{self.method} may declare {', '.join(names)}"


def _rules(handler_type: str) -> tuple[_Rule, _Rule, _Rule]:
    required = ("config", "tensorflow_client") if handler_type == "tensorflow" else ("config",)
    return (
        _Rule("__init__", True, required, ("job_spec", "metrics_client")),
        _Rule("handle_batch", True, (), ("payload", "batch_id")),
        _Rule("on_job_complete", False, ()),
    )


# source -------------------------------------------------------------------------------------------------------------


def check_source(source: str, filename: str, handler_type: str = "python") -> None:
    """Check the handler's source text without running it.

    What only running it can tell (a ``Handler`` that is imported or assigned, inherited or decorated methods) is left
    to :func:`load_file` and :func:`check_class`.

    Parameters
    ----------
    source : str
        The text of the file.
    filename : str
        How error messages call the file.
    handler_type : {"python", "tensorflow"}
        The API's ``handler.type``.

    Raises
    ------
    HandlerError
        For a syntax error, for none or several classes named ``Handler``, and for a method that is missing or has a
        wrong signature.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an invalid escape sequence is shown when the file is really loaded
        tree = parse_source(source, filename)
    definition = find_definition(tree, filename)
    if definition is None or definition.decorator_list or definition.keywords:
        return
    inherits = any(not (isinstance(base, ast.Name) and base.id == "object") for base in definition.bases)
    methods = _methods(definition)
    for rule in _rules(handler_type):
        statement = methods.get(rule.method)
        where = f"{filename}:{definition.lineno if statement is None else statement.lineno}"
        if statement is None:
            if rule.present and not inherits:
                raise _missing(rule, where)
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            _check_function(statement, rule, where)
        elif isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(statement.value, ast.Constant):
            raise _not_callable(rule, where, repr(statement.value.value))


def parse_source(source: str | bytes, filename: str) -> ast.Module:
    """Parse a handler's source text."""
    try:
        return ast.parse(source, filename)
    except SyntaxError as error:
        where = filename if error.lineno is None else f"{filename}:{error.lineno}"
        line = f": {error.text.strip()}" if error.text and error.text.strip() else ""
        raise HandlerError(f"{where}: {type(error).__name__}: {error.msg}{line}") from None
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes; nesting too deep for the parser
        raise HandlerError(f"{filename}: cannot be parsed as Python: {error}") from None


def find_definition(tree: ast.Module, filename: str) -> ast.ClassDef | None:
    """Return the one definition of ``Handler``, or None where only running the file can tell."""
    certain = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == CLASS_NAME]
    if len(certain) > 1:
        lines = " and ".join(str(node.lineno) for node in certain)
        raise HandlerError(
            f"{filename}: several classes named {CLASS_NAME} (lines {lines}); exactly one is allowed, "
            "rename or remove the others"
        )
    others = [node for node in _statements(tree.body) if node not in certain and _may_bind(node)]
    if certain and not others:
        return certain[0]
    if not certain and not others:
        classes = [node.name for node in _statements(tree.body) if isinstance(node, ast.ClassDef)]
        found = f"its classes are {', '.join(classes)}" if classes else "it defines no class"
        raise HandlerError(f"{filename}: no class named {CLASS_NAME} ({found}); exactly one is needed")
    return None


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run in the module's own scope, also those under ``if``, ``try``, ``with`` and loops."""
    for node in body:
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        for name in ("body", "orelse", "finalbody"):
            yield from _statements(getattr(node, name, ()))
        for handler in getattr(node, "handlers", ()):
            yield from _statements(handler.body)
        for case in getattr(node, "cases", ()):
            yield from _statements(case.body)


def _may_bind(node: ast.stmt) -> bool:
    """Tell whether a statement may give the name ``Handler`` a value."""
    if isinstance(node, ast.Import | ast.ImportFrom):
        return any((name.asname or name.name.partition(".")[0]) in (CLASS_NAME, "*") for name in node.names)
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return node.name == CLASS_NAME
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.With | ast.For | ast.Delete | ast.Expr):
        names = (item for item in ast.walk(node) if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store))
        # ``globals()["Handler"] = …`` and ``exec(…)`` bind names that no parser sees.
        dynamic = (item for item in ast.walk(node) if isinstance(item, ast.Name) and item.id in ("globals", "exec"))
        return any(item.id == CLASS_NAME for item in names) or any(True for _ in dynamic)
    return False


def _methods(definition: ast.ClassDef) -> dict[str, ast.stmt]:
    """Return, for each name that the class body gives a value, the last statement that does so."""
    found: dict[str, ast.stmt] = {}
    for node in _statements(definition.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {name.asname or name.name: node for name in node.names}
    return found


def _check_function(node: ast.FunctionDef | ast.AsyncFunctionDef, rule: _Rule, where: str) -> None:
    decorators = [item.id if isinstance(item, ast.Name) else None for item in node.decorator_list]
    if decorators not in ([], ["staticmethod"], ["classmethod"]):
        return  # a decorator may change the signature
    if isinstance(node, ast.AsyncFunctionDef):
        raise _coroutine(rule, where)
    if _yields(node):
        raise _generator(rule, where)
    kinds = inspect.Parameter
    arguments = node.args
    defaults = len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)
    positional: list[tuple[ast.arg, Any]] = [(item, kinds.POSITIONAL_ONLY) for item in arguments.posonlyargs]
    positional += [(item, kinds.POSITIONAL_OR_KEYWORD) for item in arguments.args]
    parameters = [_parameter(item.arg, kind, index >= defaults) for index, (item, kind) in enumerate(positional)]
    if arguments.vararg:
        parameters.append(_parameter(arguments.vararg.arg, kinds.VAR_POSITIONAL, False))
    for item, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        parameters.append(_parameter(item.arg, kinds.KEYWORD_ONLY, default is not None))
    if arguments.kwarg:
        parameters.append(_parameter(arguments.kwarg.arg, kinds.VAR_KEYWORD, False))
    _check_parameters(parameters, rule, where, bound=decorators != ["staticmethod"])


def _yields(node: ast.AST) -> bool:
    """Tell whether the function's own body contains a ``yield``."""
    return any(
        isinstance(child, ast.Yield | ast.YieldFrom)
        or (
            not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda) and _yields(child)
        )
        for child in ast.iter_child_nodes(node)
    )


# class --------------------------------------------------------------------------------------------------------------


def check_class(cls: type, handler_type: str = "python") -> HandlerSignature:
    """Check a handler class and return which arguments its methods declare.

    Parameters
    ----------
    cls : type
        The class; its name does not matter here. Methods may be inherited.
    handler_type : {"python", "tensorflow"}
        The API's ``handler.type``.

    Raises
    ------
    HandlerError
        If it is no class, if a method is missing or not callable, or if one declares an unknown argument or lacks a
        required one; the message has the signature found and what is allowed.
    """
    if not isinstance(cls, type):
        raise HandlerError(
            f"a handler must be a class, not {kind_of(cls)}; pass the class itself, not an instance of it"
        )
    declared: dict[str, frozenset[str]] = {}
    for rule in _rules(handler_type):
        where = _where(cls)
        missing = object()
        raw = inspect.getattr_static(cls, rule.method, missing)
        if raw is missing or raw is object.__init__:
            if rule.present:
                raise _missing(rule, where)
            continue
        method = raw.__func__ if isinstance(raw, staticmethod | classmethod) else raw
        bound = not isinstance(raw, staticmethod) and hasattr(type(raw), "__get__")
        if isinstance(method, property) or not callable(getattr(cls, rule.method)):
            raise _not_callable(rule, where, kind_of(method))
        _check_plain(method, rule, where)
        try:
            # ``partialmethod`` and other descriptors are only callable once they are looked up on the class.
            parameters = list(
                inspect.signature(method if callable(method) else getattr(cls, rule.method)).parameters.values()
            )
        except (TypeError, ValueError):
            raise HandlerError(
                f"{where}: {rule.method} has no signature that Python can read; {rule.describe()}"
            ) from None
        declared[rule.method] = _check_parameters(parameters, rule, where, bound=bound)
    return HandlerSignature(declared["__init__"], declared["handle_batch"], "on_job_complete" in declared)


def _where(cls: type) -> str:
    return f"class {cls.__qualname__}" if cls.__module__ == "__main__" else f"class {cls.__module__}.{cls.__qualname__}"


def kind_of(value: object) -> str:
    """Describe what kind of thing a value is."""
    return f"a value of type {type(value).__name__}"


def _check_plain(method: Callable[..., Any], rule: _Rule, where: str) -> None:
    if inspect.iscoroutinefunction(method) or inspect.isasyncgenfunction(method):
        raise _coroutine(rule, where)
    if inspect.isgeneratorfunction(method):
        raise _generator(rule, where)


def _check_parameters(parameters: list[inspect.Parameter], rule: _Rule, where: str, *, bound: bool) -> frozenset[str]:
    """Check parameters against the rule; ``bound`` says that the first one is ``self``."""
    kinds = inspect.Parameter
    plain = [_parameter(item.name, item.kind, item.default is not kinds.empty) for item in parameters]
    found = f"found {rule.method}{inspect.Signature(plain, __validate_parameters__=False)}"
    if bound:
        takes_self = bool(plain) and plain[0].kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        swallowed = bool(plain) and plain[0].kind is kinds.VAR_POSITIONAL
        if takes_self and plain[0].name not in rule.allowed:
            plain = plain[1:]
        elif not swallowed:
            raise HandlerError(f"{where}: {rule.method} lacks self as its first argument ({found}); {rule.describe()}")
    named = [item for item in plain if item.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    for item in named:
        if item.name not in rule.allowed:
            hint = "; tensorflow_client needs type: tensorflow" if item.name == "tensorflow_client" else ""
            raise HandlerError(
                f"{where}: {rule.method} has the unknown argument {item.name} ({found}); {rule.describe()}{hint}"
            )
        if item.kind is kinds.POSITIONAL_ONLY:
            raise HandlerError(
                f"{where}: the argument {item.name} of {rule.method} is positional-only ({found}), "
                "but arguments are passed by name; remove the /"
            )
    names = frozenset(item.name for item in named)
    for name in rule.required:
        if name not in names:
            raise HandlerError(f"{where}: {rule.method} lacks the argument {name} ({found}); {rule.describe()}")
    if rule.method == "handle_batch" and not names and plain:
        raise HandlerError(
            f"{where}: handle_batch declares only arguments that are never filled ({found}); {rule.describe()}, "
            "and a decorator needs functools.wraps to keep the signature"
        )
    return names


class _Elided:
    """Stands for a default value in a message: the value itself may be long, or a secret."""

    def __repr__(self) -> str:
        return "..."


def _parameter(name: str, kind: Any, has_default: bool) -> inspect.Parameter:
    return inspect.Parameter(name, kind, default=_Elided() if has_default else inspect.Parameter.empty)


def _missing(rule: _Rule, where: str) -> HandlerError:
    arguments = ", ".join(("self", *rule.required)) if rule.required else "self, payload"
    return HandlerError(f"{where}: {CLASS_NAME} has no method {rule.method}; add def {rule.method}({arguments}): …")


def _not_callable(rule: _Rule, where: str, found: str) -> HandlerError:
    return HandlerError(f"{where}: {rule.method} is not a method but {found}; {rule.describe()}")


def _coroutine(rule: _Rule, where: str) -> HandlerError:
    return HandlerError(f"{where}: {rule.method} is declared with async def; a plain def is needed")


def _generator(rule: _Rule, where: str) -> HandlerError:
    return HandlerError(f"{where}: {rule.method} is a generator (it contains yield); return the rows instead")
