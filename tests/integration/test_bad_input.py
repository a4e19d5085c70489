"""What a user may get wrong: one sentence, exit code 2, one exception of ours, and nothing left in the output.

Each mistake is made on the command line and from Python, with files and buckets. Afterwards the same output directory
takes the job that is right.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import dask.config
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import cortex_dask as cx
from cortex_dask.cli import main
from cortex_dask.io.store.store import Store
from tests.conftest import follow_environment

CORTEX_YAML = """\
- name: doubler
  kind: BatchAPI
  handler: {type: python, path: handler.py}
"""

HANDLER = """\
class Handler:
    def __init__(self, config):
        pass

    def handle_batch(self, payload):
        return {"y": [2 * row["x"] for row in payload]}
"""


@dataclass
class Place:
    """A project, an input of 20 rows in 2 files, and an output that is not there yet."""

    folder: Path
    root: str  # of input and output: a folder or a bucket
    arguments: dict[str, object] = field(default_factory=lambda: {"batch_size": 5, "batch_format": "records"})

    @property
    def project(self) -> Path:
        return self.folder / "project"

    @property
    def data(self) -> Store:
        return Store(f"{self.root}/in")

    @property
    def output(self) -> Store:
        return Store(str(self.arguments.get("output", f"{self.root}/out")))

    def command(self) -> list[str]:
        """Return the command line of the job."""
        keys = {"input": f"{self.root}/in", "output": f"{self.root}/out", **self.arguments}
        options = [text for key, value in keys.items() for text in (f"--{key.replace('_', '-')}", str(value))]
        return ["submit", str(self.project), *options]

    def run(self) -> cx.Job:
        """Run the job from Python."""
        keys = {"input": f"{self.root}/in", "output": f"{self.root}/out", **self.arguments}
        return cx.run(str(self.project), progress=False, workers=1, **keys)  # type: ignore[arg-type]  # some are wrong


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    root = str(tmp_path / "data") if request.param == "local" else request.getfixturevalue("s3")
    made = Place(tmp_path, root)
    made.project.mkdir()
    (made.project / "cortex.yaml").write_text(CORTEX_YAML)
    (made.project / "handler.py").write_text(HANDLER)
    for number in range(2):
        made.data.write(f"{number}.parquet", parquet(range(number * 10, number * 10 + 10)))
    monkeypatch.setenv("DASK_CORTEX_DASK__STORE", str(tmp_path / "store"))
    monkeypatch.setenv("DASK_CORTEX_DASK__CACHE", str(tmp_path / "cache"))
    with dask.config.set({"cortex-dask.store": str(tmp_path / "store")}):
        yield made


def parquet(values: range) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"x": pa.array(values, pa.int64())}), sink)
    return bytes(sink.getvalue())


def unknown_path(place: Place) -> None:
    place.arguments["input"] = f"{place.root}/nowhere"


def no_match(place: Place) -> None:
    place.arguments["input"] = f"{place.root}/in/*.json"


def no_rows(place: Place) -> None:
    for number in range(2):
        place.data.write(f"{number}.parquet", parquet(range(0)))


def file_of_zero_bytes(place: Place) -> None:
    place.data.write("1.parquet", b"")


def truncated_file(place: Place) -> None:
    place.data.write("1.parquet", place.data.read("1.parquet")[:-100])


def unreadable_file(place: Place) -> None:
    place.data.write("1.parquet", b"\xff" * 1000)


def csv_file(place: Place) -> None:
    place.data.write("1.csv", b"x,y\n1,2\n")


def parquet_as_json(place: Place) -> None:
    place.arguments["format"] = "json"


def wrong_key_in_yaml(place: Place) -> None:
    (place.project / "cortex.yaml").write_text(CORTEX_YAML.replace("type:", "typ:"))


def wrong_type_in_yaml(place: Place) -> None:
    (place.project / "cortex.yaml").write_text(CORTEX_YAML.replace("handler.py", "[1]"))


def broken_yaml(place: Place) -> None:
    (place.project / "cortex.yaml").write_text(CORTEX_YAML.replace("}", ""))


def no_handler_file(place: Place) -> None:
    (place.project / "handler.py").unlink()


def wrong_signature(place: Place) -> None:
    (place.project / "handler.py").write_text(HANDLER.replace("self, payload", "self, rows"))


def forgotten_self(place: Place) -> None:
    (place.project / "handler.py").write_text(HANDLER.replace("self, payload", "payload"))


def syntax_error(place: Place) -> None:
    (place.project / "handler.py").write_text(HANDLER.replace("(self, config):", "(self, config)"))


def batch_size_0(place: Place) -> None:
    place.arguments["batch_size"] = 0


def unknown_cluster(place: Place) -> None:
    place.arguments["cluster"] = "moon"


def unknown_protocol(place: Place) -> None:
    place.arguments["input"] = "nosuch://bucket/in"


def output_not_writable(place: Place) -> None:
    (place.folder / "file").write_text("not a folder")
    place.arguments["output"] = str(place.folder / "file" / "out")


def output_is_input(place: Place) -> None:
    place.arguments["output"] = f"{place.root}/in"


def output_in_input(place: Place) -> None:
    place.arguments["output"] = f"{place.root}/in/out"


Mistake = Callable[[Place], None]

#: Each mistake, the exception from Python, and what the sentence names.
MISTAKES: list[tuple[Mistake, type[cx.CortexDaskError], str]] = [
    (unknown_path, cx.DatasetError, "nowhere"),
    (no_match, cx.DatasetError, "*.json matches no file"),
    (no_rows, cx.DatasetError, "no rows"),
    (file_of_zero_bytes, cx.DatasetError, "in/1.parquet"),
    (truncated_file, cx.DatasetError, "in/1.parquet"),
    (unreadable_file, cx.DatasetError, "in/1.parquet"),
    (csv_file, cx.DatasetError, "in/1.csv"),
    (parquet_as_json, cx.DatasetError, "in/0.parquet holds binary data"),
    (wrong_key_in_yaml, cx.SpecError, "did you mean type?"),
    (wrong_type_in_yaml, cx.SpecError, "handler.path: found"),
    (broken_yaml, cx.SpecError, "cortex.yaml"),
    (no_handler_file, cx.SpecError, "handler.py"),
    (wrong_signature, cx.HandlerError, "unknown argument rows"),
    (forgotten_self, cx.HandlerError, "lacks self"),
    (syntax_error, cx.HandlerError, "handler.py:2: SyntaxError"),
    (batch_size_0, cx.SpecError, "batch_size: found 0"),
    (unknown_cluster, cx.SpecError, "cluster: 'moon'"),
    (unknown_protocol, cx.CortexDaskError, "nosuch"),
    (output_not_writable, cx.OutputError, "file/out"),
    (output_is_input, cx.OutputError, "holds 2 files already"),
    (output_in_input, cx.OutputError, "lies in the input"),
]


@pytest.mark.parametrize(("mistake", "kind", "said"), MISTAKES, ids=[mistake.__name__ for mistake, _, _ in MISTAKES])
def test_a_mistake_is_one_sentence(place: Place, mistake: Mistake, kind: type[cx.CortexDaskError], said: str) -> None:
    mistake(place)
    before = files(place)

    done = CliRunner().invoke(main, place.command())
    with pytest.raises(kind) as caught:
        place.run()

    check(done.exit_code, done.stdout, done.stderr, said)
    assert said in str(caught.value)
    assert files(place) == before


@pytest.mark.parametrize("given", ["command line", "Python"])
def test_a_column_that_is_not_there(place: Place, given: str) -> None:
    if given == "command line":
        place.arguments["keep"] = "z"
        done = CliRunner().invoke(main, place.command())
        check(done.exit_code, done.stdout, done.stderr, "keep names the column 'z'")
    else:
        place.arguments["keep"] = ["z"]
        with pytest.raises(cx.DatasetError, match="keep names the column 'z'"):
            place.run()
    assert place.output.names() == []


def test_whoever_corrects_the_mistake_uses_the_same_output(place: Place) -> None:
    place.arguments["input"] = f"{place.root}/nowhere"
    with pytest.raises(cx.DatasetError):
        place.run()
    del place.arguments["input"]
    (place.project / "handler.py").write_text(f"import no_such_module\n{HANDLER}")
    with pytest.raises(cx.JobFailedError, match="no_such_module"):
        place.run()
    (place.project / "handler.py").write_text(HANDLER)

    job = place.run()

    assert sorted(job.to_pandas()["y"]) == [2 * x for x in range(20)]
    assert sorted(place.output.names())[:2] == ["_SUCCESS", "_manifest.json"]


def test_a_job_that_left_its_output_free_asks_for_it_again(place: Place) -> None:
    (place.project / "handler.py").write_text(f"import no_such_module\n{HANDLER}")
    with pytest.raises(cx.JobFailedError):
        place.run()
    failed = cx.Client().get_job("doubler", "latest")
    (place.project / "handler.py").write_text(HANDLER)
    place.run()

    with pytest.raises(cx.OutputError, match=r"holds .* already"):
        failed.resume().wait()


@pytest.mark.s3
@pytest.mark.parametrize("where", ["input", "output"])
def test_a_bucket_that_is_not_there(place: Place, s3: str, where: str) -> None:
    place.arguments[where] = "s3://no-such-bucket-anywhere/data"

    done = CliRunner().invoke(main, place.command())
    with pytest.raises(cx.CortexDaskError, match="no-such-bucket-anywhere"):
        place.run()

    check(done.exit_code, done.stdout, done.stderr, "no-such-bucket-anywhere")


@pytest.mark.s3
@pytest.mark.parametrize("where", ["input", "output"])
def test_no_credentials(place: Place, s3: str, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    place.arguments[where] = f"{s3}/{where}"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    follow_environment()

    if place.root.startswith("s3"):
        place.root = str(place.folder)
        place.data.write("0.parquet", parquet(range(10)))
    done = CliRunner().invoke(main, place.command())
    with pytest.raises(cx.CortexDaskError, match="credentials"):
        place.run()

    check(done.exit_code, done.stdout, done.stderr, "credentials")


def test_it_is_the_same_in_a_process_of_its_own(place: Place) -> None:
    unknown_path(place)
    command = [sys.executable, "-m", "cortex_dask", *place.command(), "-o", "json"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=Path(cx.__file__).parents[1])

    check(done.returncode, done.stdout, done.stderr, "nowhere")
    (status,) = place.folder.glob("store/jobs/doubler/*/status.json")
    assert json.loads(status.read_text())["status"] == "failed while enqueuing"


def check(code: int, out: str, err: str, said: str) -> None:
    """Check what a command left: exit code 2, and one sentence where progress is shown otherwise."""
    lines = [line for line in err.splitlines() if not line.endswith(": enqueuing")]
    assert (code, out) == (2, ""), err
    assert len(lines) == 1, err
    assert lines[0].startswith("Error: ")
    assert said in lines[0]
    assert "Traceback" not in err
    assert "this is a bug" not in err


def files(place: Place) -> list[str]:
    """Return what lies where the job reads and writes."""
    return place.data.names() + Store(f"{place.root}/out").names()
