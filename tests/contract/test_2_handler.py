"""CONTRACT 2, the handler: which methods it has, when they are called, and what they are given; through real jobs."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import dask.config
import pytest
from click.testing import CliRunner

import cortex_dask as cx
from cortex_dask.cli import main
from cortex_dask.job import Job

CORTEX_YAML = """\
- name: handler
  kind: BatchAPI
  handler:
    type: python
    path: src/handler.py
    config: {model: {name: resnet, layers: [1, 2], size: {x: 1, y: 2}}, kept: yes, gone: 1}
"""

#: Notes each call in a file of its own; ``SIGNATURE`` stands for what the methods declare.
NOTING = """\
import json
import os
import uuid


def note(config, /, **what):
    with open(os.path.join(config["calls"], uuid.uuid4().hex), "w") as file:
        json.dump({"pid": os.getpid(), **what}, file)
"""

#: Takes part in everything.
HANDLER = (
    NOTING
    + """

class Handler:
    def __init__(self, config, job_spec, metrics_client):
        self.config, self.spec, self.batches = config, job_spec, []
        note(config, method="__init__", given=dict(config), spec=dict(job_spec), metrics=type(metrics_client).__name__)
        config["model"]["name"] = "changed by the handler"
        job_spec["config"]["model"] = "changed by the handler"

    def handle_batch(self, payload, batch_id):
        self.batches.append(payload)
        note(self.config, method="handle_batch", payload=payload, batch_id=batch_id)
        if self.config.get("fail") in payload and len([b for b in self.batches if b == payload]) < 3:
            raise ValueError("not yet")

    def on_job_complete(self):
        note(self.config, method="on_job_complete", batches=self.batches)
"""
)


class Project:
    """A project directory, and what its handler notes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "project"
        (self.path / "src").mkdir(parents=True)
        (folder / "calls").mkdir()
        self.write(HANDLER)

    def write(self, handler: str, configuration: str = CORTEX_YAML) -> None:
        (self.path / "src/handler.py").write_text(handler)
        (self.path / "cortex.yaml").write_text(configuration)

    def options(self, **options: Any) -> dict[str, Any]:
        config = {"calls": str(self.folder / "calls"), **options.pop("config", {})}
        items = {"items": list(range(6)), "batch_size": 2}
        return {"workers": 1, "item_list": items, **options, "config": config}

    def run(self, **options: Any) -> Job:
        return cx.run(self.path, progress=False, **self.options(**options))

    def submit(self, *arguments: str) -> Any:
        """Submit from the command line."""
        done = CliRunner().invoke(
            main, ["submit", str(self.path), "--job", "-", *arguments], input=json.dumps(self.options())
        )
        return done

    def calls(self, method: str) -> list[dict[str, Any]]:
        notes = [json.loads(path.read_text()) for path in (self.folder / "calls").iterdir()]
        return [note for note in notes if note["method"] == method]


@pytest.fixture
def project(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Project]:
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    monkeypatch.setenv("DASK_CORTEX_DASK__STORE", str(tmp_path / "store"))
    monkeypatch.setenv("DASK_CORTEX_DASK__CACHE", cache)
    with dask.config.set({"cortex-dask.store": str(tmp_path / "store"), "cortex-dask.cache": cache}):
        yield Project(tmp_path)


# the class ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("handler", "words"),
    [
        ("class Predictor:\n    pass\n", "Handler"),
        ("x = 1\n", "Handler"),
        (HANDLER + "\n\nclass Handler:\n    pass\n", "Handler"),
        (HANDLER.replace("def handle_batch", "def handle_batches"), "handle_batch"),
        (HANDLER.replace("def __init__", "def initialise"), "__init__"),
        (HANDLER.replace("(self, config, job_spec, metrics_client)", "(self, job_spec)"), "config"),
        (HANDLER.replace("metrics_client)", "metrics_client, tensorflow_client)"), "tensorflow_client"),
        (HANDLER.replace("payload, batch_id)", "payload, query_params)"), "query_params"),
        (HANDLER.replace("def on_job_complete(self)", "def on_job_complete(self, results)"), "results"),
        (NOTING + "\n\nclass Handler:\n    __init__ = 5\n    handle_batch = None\n", "__init__"),
    ],
    ids=[
        "another name",
        "no class",
        "two classes",
        "no handle_batch",
        "no __init__",
        "without config",
        "tensorflow_client of a python handler",
        "an unknown argument",
        "an argument of on_job_complete",
        "not callable",
    ],
)
def test_what_is_no_handler_is_rejected_before_any_batch_runs(project: Project, handler: str, words: str) -> None:
    project.write(handler)
    done = project.submit()
    assert done.exit_code == 2, done.output
    assert "handler.py" in done.output
    assert words in done.output
    assert "Traceback" not in done.output
    assert not (project.folder / "store/jobs").exists()
    assert not list((project.folder / "calls").iterdir())


def test_a_wrong_signature_is_shown_with_what_is_allowed(project: Project) -> None:
    project.write(HANDLER.replace("payload, batch_id)", "payload, query_params)"))
    text = " ".join(project.submit().output.split())
    assert "handle_batch(self, payload, query_params)" in text
    assert "handle_batch may declare payload, batch_id" in text


def test_what_only_running_can_tell_ends_the_job_before_its_first_batch(project: Project) -> None:
    """The class is made when the file runs, so its source does not tell."""
    project.write(
        NOTING + "\n\ndef handle(self, payload, other):\n    note(self.config, method='handle_batch')\n\n\n"
        "def start(self, config):\n    self.config = config\n\n\n"
        "Handler = type('Handler', (), {'__init__': start, 'handle_batch': handle})\n"
    )
    with pytest.raises(cx.JobFailedError, match="other") as caught:
        project.run()
    assert caught.value.status == "worker error"
    assert project.calls("handle_batch") == []


# its arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("init", "handle"),
    [
        ("config", ""),
        ("config", "payload"),
        ("config", "batch_id"),
        ("metrics_client, config", "batch_id, payload"),
        ("job_spec, config", "payload"),
        ("*, config", "*, payload"),
    ],
)
def test_arguments_are_passed_by_name_and_only_those_declared(project: Project, init: str, handle: str) -> None:
    project.write(
        NOTING + f"\n\nclass Handler:\n    def __init__(self, {init}):\n        self.config = config\n\n"
        f"    def handle_batch(self, {handle}):\n"
        "        given = {name: value for name, value in locals().items() if name in ('payload', 'batch_id')}\n"
        "        note(self.config, method='handle_batch', given=given)\n"
    )
    project.run(cluster="inline")
    calls = [call["given"] for call in project.calls("handle_batch")]
    assert len(calls) == 3
    assert all(set(given) == {"payload", "batch_id"} & set(handle.replace(",", "").split()) for given in calls)
    if "payload" in handle:
        assert sorted(given["payload"] for given in calls) == [[0, 1], [2, 3], [4, 5]]


def test_config_is_overridden_deeply_and_the_handlers_own_copy(project: Project) -> None:
    over = {"model": {"layers": [3], "size": {"y": 9}}, "gone": None, "new": {"a": 1}}
    job = project.run(config=over)
    (made,) = project.calls("__init__")
    assert made["given"] == {
        "model": {"name": "resnet", "layers": [3], "size": {"x": 1, "y": 9}},
        "kept": True,
        "gone": None,
        "new": {"a": 1},
        "calls": str(project.folder / "calls"),
    }
    # What the handler does to its copies reaches neither the other one nor the job.
    assert "changed" not in json.dumps(made["spec"])
    assert "changed" not in json.dumps([job.describe(), job.settings.to_json()])
    assert job.describe()["config"] == {**over, "calls": str(project.folder / "calls")}


def test_job_spec(project: Project) -> None:
    before = time.time()
    job = project.run(workers=2, config={"model": {"name": "other"}})
    specs = [call["spec"] for call in project.calls("__init__")]
    assert all(spec == specs[0] for spec in specs)
    spec = specs[0]
    assert (
        spec
        | {
            "job_id": job.job_id,
            "api_name": "handler",
            "config": {"model": {"name": "other"}, "calls": str(project.folder / "calls")},  # as given, not as merged
            "workers": 2,
            "total_batch_count": 3,
        }
        == spec
    )
    assert isinstance(spec["start_time"], str)
    assert before - 1 <= datetime.fromisoformat(spec["start_time"]).timestamp() <= time.time()


def test_a_batch_keeps_its_id_when_it_is_tried_again(project: Project) -> None:
    job = project.run(config={"fail": 2}, max_attempts=3)
    ids: dict[str, list[str]] = {}
    for call in project.calls("handle_batch"):
        ids.setdefault(str(call["payload"]), []).append(call["batch_id"])
    assert {payload: len(tries) for payload, tries in ids.items()} == {"[0, 1]": 1, "[2, 3]": 3, "[4, 5]": 1}
    distinct = {batch_id for tries in ids.values() for batch_id in tries}
    assert len(distinct) == 3
    assert all(str(uuid.UUID(batch_id)) == batch_id for batch_id in distinct)
    assert job.describe()["batch_metrics"] | {"succeeded": 3, "failed": 2} == job.describe()["batch_metrics"]


def test_the_halves_of_a_batch_that_takes_too_much_memory_have_ids_of_their_own(project: Project) -> None:
    """A handler that names its own results by the batch must not overwrite one half with the other."""
    project.write(
        NOTING + "\n\nclass Handler:\n    def __init__(self, config): self.config = config\n\n"
        "    def handle_batch(self, payload, batch_id):\n"
        "        if len(payload) > 1:\n            raise MemoryError\n"
        "        note(self.config, method='handle_batch', payload=payload, batch_id=batch_id)\n"
    )
    assert project.run().status == "succeeded"
    calls = project.calls("handle_batch")
    assert sorted(call["payload"] for call in calls) == [[number] for number in range(6)]
    assert len({call["batch_id"] for call in calls}) == 6


def test_another_job_gives_other_ids(project: Project) -> None:
    for _ in range(2):
        project.run()
    assert len({call["batch_id"] for call in project.calls("handle_batch")}) == 6


def test_a_payload_is_a_dataframe_for_a_dataset(project: Project) -> None:
    import pandas as pd

    project.write(
        NOTING + "\n\nclass Handler:\n    def __init__(self, config): self.config = config\n\n"
        "    def handle_batch(self, payload):\n"
        "        note(self.config, method='handle_batch', type=type(payload).__name__, rows=len(payload))\n"
    )
    pd.DataFrame({"x": range(10)}).to_parquet(project.folder / "in.parquet")
    config = {"calls": str(project.folder / "calls")}
    cx.run(project.path, project.folder / "in.parquet", batch_size=4, workers=1, config=config, progress=False)
    calls = project.calls("handle_batch")
    assert {call["type"] for call in calls} == {"DataFrame"}
    assert sorted(call["rows"] for call in calls) == [2, 4, 4]


# when they are called -------------------------------------------------------------------------------------------------


def test_init_once_per_worker_batches_once_and_completion_once_at_the_end(project: Project) -> None:
    project.run(workers=2, item_list={"items": list(range(20)), "batch_size": 1})
    made = project.calls("__init__")
    assert 1 <= len(made) <= 2
    assert len({call["pid"] for call in made}) == len(made)
    handled = project.calls("handle_batch")
    assert sorted(call["payload"] for call in handled) == [[number] for number in range(20)]
    assert {call["pid"] for call in handled} <= {call["pid"] for call in made}
    (completed,) = project.calls("on_job_complete")
    assert completed["pid"] in {call["pid"] for call in made}


def test_with_one_worker_completion_runs_on_the_instance_that_handled_the_batches(project: Project) -> None:
    project.run(workers=1)
    (completed,) = project.calls("on_job_complete")
    assert completed["batches"] == [[0, 1], [2, 3], [4, 5]]
    assert len({call["pid"] for method in ("__init__", "handle_batch") for call in project.calls(method)}) == 1


def test_on_job_complete_is_not_required(project: Project) -> None:
    project.write(HANDLER.partition("    def on_job_complete")[0])
    assert project.run().status == "succeeded"
    assert len(project.calls("handle_batch")) == 3


# what it returns ------------------------------------------------------------------------------------------------------


def test_returning_nothing_is_a_success_without_output(project: Project) -> None:
    job = project.run()
    document = job.describe()
    assert (document["status"], document["rows_in"], document["rows_out"]) == ("succeeded", 6, 0)
    assert document["output"] is None


def test_returning_nothing_where_there_is_an_output(project: Project) -> None:
    job = project.run(output=str(project.folder / "out"))
    assert (job.status, job.describe()["rows_out"]) == ("succeeded", 0)
    assert (project.folder / "out/_SUCCESS").exists()
    assert not list(project.folder.glob("out/part-*"))


def test_returned_rows_become_the_jobs_output(project: Project) -> None:
    project.write(
        HANDLER.replace('raise ValueError("not yet")', "pass").replace(
            "    def on_job", "        return [{'square': x * x} for x in payload]\n\n    def on_job"
        )
    )
    job = project.run(output=str(project.folder / "out"))
    assert job.to_pandas()["square"].tolist() == [0, 1, 4, 9, 16, 25]


# type: tensorflow -----------------------------------------------------------------------------------------------------


def test_a_tensorflow_handler_has_to_take_its_client(project: Project) -> None:
    configuration = CORTEX_YAML.replace("type: python", "type: tensorflow\n    models: {path: model}")
    project.write(HANDLER, configuration)
    done = project.submit()
    assert done.exit_code == 2
    assert "tensorflow_client" in done.output
    project.write(HANDLER.replace("config, job_spec", "config, tensorflow_client, job_spec"), configuration)
    assert project.submit("--dry-run").exit_code == 0
