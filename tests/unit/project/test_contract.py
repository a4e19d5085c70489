"""The Handler contract: what is accepted, what is rejected, and with which words."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap

import pytest

from cortex_dask.errors import HandlerError
from cortex_dask.project.contract import HandlerSignature, check_class, check_source
from cortex_dask.project.loader import load_file

INIT = "def __init__(self, config): ..."
BATCH = "def handle_batch(self, payload): ..."


def handler(*methods: str, head: str = "class Handler:") -> str:
    return "\n".join([head, *(textwrap.indent(method, "    ") for method in methods)]) + "\n"


def both(source: str, handler_type: str = "python") -> tuple[str | None, str | None]:
    """Return what the check of the source, and that of the class, say; None where they accept."""
    answers: list[str | None] = []
    for check in ("source", "class"):
        try:
            if check == "source":
                check_source(source, "handler.py", handler_type)
            else:
                names: dict[str, object] = {}
                exec(source, names)
                check_class(names["Handler"], handler_type)  # type: ignore[arg-type]
            answers.append(None)
        except HandlerError as error:
            answers.append(str(error))
    return answers[0], answers[1]


@pytest.mark.parametrize(
    "source",
    [
        handler(INIT, BATCH),
        handler("def __init__(self, config, job_spec, metrics_client): ...", "def handle_batch(self): ..."),
        handler("def __init__(self, *, config): ...", "def handle_batch(self, batch_id, payload): ..."),
        handler("def __init__(self, config, *args, **kwargs): ...", "def handle_batch(self, payload, **kwargs): ..."),
        handler("def __init__(this, config=None): ...", "@staticmethod\ndef handle_batch(payload): ..."),
        handler(INIT, "@classmethod\ndef handle_batch(cls, payload): ..."),
        handler(INIT, BATCH, "def on_job_complete(self): ..."),
        handler(INIT, "handle_batch = lambda self, payload: payload"),
        handler("config: dict", BATCH, head="from dataclasses import dataclass\n@dataclass\nclass Handler:"),
        "class Base:\n    def __init__(self, config): ...\n" + handler(BATCH, head="class Handler(Base):"),
        handler(
            INIT,
            "@wrap\ndef handle_batch(self, payload): ...",
            head="import functools\ndef wrap(f):\n    @functools.wraps(f)\n    def g(*a, **k): return f(*a, **k)\n"
            "    return g\nclass Handler:",
        ),
        handler(
            INIT,
            "def call(self, scale, payload): ...\nhandle_batch = partialmethod(call, 2)",
            head="from functools import partialmethod\nclass Handler:",
        ),
    ],
)
def test_accepts(source: str) -> None:
    assert both(source) == (None, None)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (handler(BATCH), "Handler has no method __init__; add def __init__(self, config)"),
        (handler(INIT), "Handler has no method handle_batch; add def handle_batch(self, payload)"),
        (handler("def __init__(self): ...", BATCH), "__init__ lacks the argument config (found __init__(self))"),
        (
            handler("def __init__(self, config, model='secret'): ...", BATCH),
            "__init__ has the unknown argument model (found __init__(self, config, model=...)); "
            "__init__ may declare config (required), job_spec, metrics_client",
        ),
        (
            handler(INIT, "def handle_batch(self, batch): ..."),
            "unknown argument batch (found handle_batch(self, batch))",
        ),
        (handler(INIT, "def handle_batch(payload): ..."), "handle_batch lacks self as its first argument"),
        (handler(INIT, "def handle_batch(): ..."), "handle_batch lacks self as its first argument"),
        (handler(INIT, "def handle_batch(self, payload, /): ..."), "payload of handle_batch is positional-only"),
        (handler(INIT, "def handle_batch(self, *args, **kwargs): ..."), "a decorator needs functools.wraps"),
        (handler(INIT, "async def handle_batch(self, payload): ..."), "handle_batch is declared with async def"),
        (handler(INIT, "def handle_batch(self, payload):\n    yield payload"), "handle_batch is a generator"),
        (handler(INIT, "handle_batch = 3"), "handle_batch is not a method but"),
        (handler(INIT, BATCH, "def on_job_complete(self, x=1): ..."), "on_job_complete takes no arguments beside self"),
        (
            handler("def __init__(self, config, tensorflow_client): ...", BATCH),
            "tensorflow_client needs type: tensorflow",
        ),
    ],
)
def test_rejects(source: str, words: str) -> None:
    for answer in both(source):
        assert answer is not None
        assert words in answer
        assert "secret" not in answer


def test_tensorflow_needs_its_client() -> None:
    assert both(handler("def __init__(self, tensorflow_client, config): ...", BATCH), "tensorflow") == (None, None)
    answers = both(handler(INIT, BATCH), "tensorflow")
    assert all(answer is not None and "lacks the argument tensorflow_client" in answer for answer in answers)


def test_class_must_be_a_class() -> None:
    with pytest.raises(HandlerError, match=r"must be a class, not a value of type int; .* not an instance"):
        check_class(3)  # type: ignore[arg-type]


def test_signature_says_what_to_pass() -> None:
    class Base:
        def on_job_complete(self) -> None: ...

    class Handler(Base):
        def __init__(self, config: dict, metrics_client: object) -> None: ...  # type: ignore[type-arg]

        def handle_batch(self, payload: object, batch_id: str) -> None: ...

    assert check_class(Handler) == HandlerSignature(
        frozenset({"config", "metrics_client"}), frozenset({"payload", "batch_id"}), True
    )


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("x = 1\n", "handler.py: no class named Handler (it defines no class)"),
        ("class handler: ...\n", "no class named Handler (its classes are handler)"),
        ("class Outer:\n    class Handler: ...\n", "no class named Handler"),
        (handler(INIT, BATCH) * 2, "several classes named Handler (lines 1 and 4); exactly one is allowed"),
        ("class Handler\n    pass\n", "handler.py:1: SyntaxError: expected ':': class Handler"),
        ("def f():\nreturn 1\n", "handler.py:2: IndentationError"),
        ("x = '\0'\n", "handler.py"),
    ],
)
def test_source_without_exactly_one_class(source: str, words: str) -> None:
    with pytest.raises(HandlerError) as caught:
        check_source(source, "handler.py")
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "from my_module import Handler\n",
        "from my_module import *\n",
        "from my_module import Thing as Handler\n",
        "import my_module\nHandler = my_module.make()\n",
        "try:\n    from fast import Handler\nexcept ImportError:\n    class Handler: ...\n",
        "if True:\n    class Handler: ...\nelse:\n    class Handler: ...\n",
        "from base import Handler as Base\nclass Handler(Base): ...\n",
        "from base import make\nfor Handler in make(): ...\n",
        "globals()['Handler'] = object\n",
    ],
)
def test_source_leaves_to_running_what_only_running_can_tell(source: str) -> None:
    check_source(source, "handler.py")


def test_load_file(tmp_path, monkeypatch) -> None:
    file = tmp_path / "my_handler.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass(slots=True)\nclass Result:\n    label: str\n" + handler(INIT, BATCH)
    )
    cls = load_file(str(file))
    try:
        assert check_class(cls).init == {"config"}
        result = sys.modules[cls.__module__].Result("x")
        assert pickle.loads(pickle.dumps(result)) == result
        assert cls.__module__.startswith("cortex_handler_")  # nothing could import it as my_handler
        assert not (tmp_path / "__pycache__").exists()
    finally:
        del sys.modules[cls.__module__]


def test_load_file_under_its_own_name(tmp_path) -> None:
    """A helper that imports the handler's module back gets the same module, in a fresh process as it really is."""
    (tmp_path / "handler.py").write_text("import helper\n" + handler(INIT, BATCH))
    (tmp_path / "helper.py").write_text("def handler_class():\n    import handler\n    return handler.Handler\n")
    (tmp_path / "json.py").write_text(handler(INIT, BATCH))
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1]); from cortex_dask.project.loader import load_file\n"
        "cls = load_file(sys.argv[1] + '/handler.py'); import helper\n"
        "assert helper.handler_class() is cls, cls.__module__\n"
        "other = load_file(sys.argv[1] + '/json.py'); assert other.__module__ != 'json' and json.dumps(1)\n"
        "heavy = {'dask', 'distributed', 'pydantic', 'click', 'rich', 'pandas', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "import no_such_module_anywhere\n" + handler(INIT, BATCH),
            ":1: the file cannot be loaded: ModuleNotFoundError",
        ),
        ("x = 1\nimport sys\nsys.exit(3)\nclass Handler: ...\n", ":3: the file cannot be loaded: SystemExit: 3"),
        ("from types import SimpleNamespace as Handler\nHandler = Handler()\n", "its Handler is a value of type"),
        ("globals()['Other'] = 1\n", "exactly one class named Handler is needed; it has none"),
        ("class Handler\n", ":1: SyntaxError"),
    ],
)
def test_load_file_that_does_not_load(tmp_path, source: str, words: str) -> None:
    file = tmp_path / "handler.py"
    file.write_text(source)
    before = set(sys.modules)
    with pytest.raises(HandlerError) as caught:
        load_file(str(file))
    assert words in str(caught.value)
    assert not [name for name in set(sys.modules) - before if name.startswith("cortex_handler_")]


def test_load_file_that_is_not_there(tmp_path) -> None:
    with pytest.raises(HandlerError, match=r"handler\.py: cannot be read: No such file"):
        load_file(str(tmp_path / "handler.py"))
