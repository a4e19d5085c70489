"""Contract 4, submission: the three input kinds of Cortex, from Python and the command line, local and on S3."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask.config
import fsspec
import pytest
from click.testing import CliRunner, Result

import cortex_dask as cx
from cortex_dask.cli import main
from cortex_dask.io.job.splits import batch_id
from cortex_dask.job import Job

#: Everything is told by the job's config, so that one project serves all tests.
HANDLER = """\
import json
import os
import time
from pathlib import Path


class Handler:
    def __init__(self, config, job_spec):
        self.config = config
        self.spec = job_spec

    def handle_batch(self, payload, batch_id):
        kind = type(payload).__name__
        told = {"payload": payload, "type": kind, "id": batch_id, "total": self.spec["total_batch_count"]}
        with open(self.config["calls"], "a") as calls:
            calls.write(json.dumps(told) + "\\n")
        if self.meets("fail", payload):
            raise ValueError("no luck")
        if self.meets("crash", payload):
            os._exit(9)
        while self.meets("hold", payload):
            time.sleep(0.01)
        payload.reverse()  # it is the handler's own
        return [{"sample": json.dumps(sample)} for sample in reversed(payload)]

    def meets(self, key, payload):
        return key in self.config and self.config[key] in payload and not Path(self.config["cured"]).exists()
"""

CORTEX_YAML = """\
- name: samples
  kind: BatchAPI
  handler:
    type: python
    path: handler.py
"""


class Project:
    """A project directory, and what its handler was given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "project"
        self.path.mkdir()
        (self.path / "handler.py").write_text(HANDLER)
        (self.path / "cortex.yaml").write_text(CORTEX_YAML)
        self.cured = folder / "cured"

    def config(self, **config: Any) -> dict[str, Any]:
        return {"calls": str(self.folder / "calls"), "cured": str(self.cured), **config}

    def run(self, **options: Any) -> Job:
        config = self.config(**options.pop("config", {}))
        return cx.run(self.path, progress=False, config=config, **{"workers": 2, **options})

    def command(self, *arguments: object, stdin: str | None = None) -> Result:
        config = [f"--config={key}={json.dumps(value)}" for key, value in self.config().items()]
        return CliRunner().invoke(main, ["submit", str(self.path), *config, *map(str, arguments)], input=stdin)

    def calls(self) -> list[dict[str, Any]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def batches(self) -> list[Any]:
        """Return what the calls were given, in input order where samples sort so."""
        return sorted((call["payload"] for call in self.calls()), key=json.dumps)


@pytest.fixture
def project(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Project]:
    monkeypatch.chdir(tmp_path)
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    monkeypatch.setenv("DASK_CORTEX_DASK__STORE", str(tmp_path / "store"))
    monkeypatch.setenv("DASK_CORTEX_DASK__CACHE", cache)
    with dask.config.set({"cortex-dask.store": str(tmp_path / "store"), "cortex-dask.cache": cache}):
        yield Project(tmp_path)


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of images and of lines, local and on S3."""
    root = str(tmp_path / "bucket") if request.param == "local" else str(request.getfixturevalue("s3"))
    fs, path = fsspec.url_to_fs(root)
    files = {
        **{f"images/img_{number}.png": b"x" for number in range(5)},
        "images/img_5.jpg": b"x",
        "images/thumbs/img_6.png": b"x",
        "images/readme.txt": b"x",
        "lines/a.jsonl": b'{"a": 1}\n\n[2]\n"three"\n',
        "lines/b.jsonl.gz": gzip.compress(b"4\n5\n"),
        "lines/c.jsonl": b"6\nnull\n8",
        "lines/empty.jsonl": b"",
        "other/x.jsonl": b"9\n",
    }
    for name, data in files.items():
        fs.makedirs(f"{path}/{name}".rpartition("/")[0], exist_ok=True)
        fs.pipe(f"{path}/{name}", data)
    if request.param == "s3":
        fs.call_s3("put_object", Bucket=path, Key="images/", Body=b"")
    return root


def images(bucket: str, *numbers: int) -> list[str]:
    return [f"{bucket}/images/img_{number}.png" for number in numbers]


LINES = [{"a": 1}, [2], "three", 4, 5, 6, None, 8]


class TestItemList:
    ITEMS = (1, "two", {"three": None}, [4, 5.5], True, None, 2**70)

    def test_a_sample_is_the_item_and_a_payload_a_list_of_them(self, project: Project) -> None:
        job = project.run(item_list={"items": list(self.ITEMS), "batch_size": 3})
        assert job.status == "succeeded"
        batches = [list(self.ITEMS[:3]), list(self.ITEMS[3:6]), list(self.ITEMS[6:])]
        assert project.batches() == sorted(batches, key=json.dumps)
        assert {call["type"] for call in project.calls()} == {"list"}

    def test_the_number_of_batches_is_exact_before_the_first_one_runs(self, project: Project) -> None:
        document = project.run(item_list={"items": list(range(10)), "batch_size": 4}).describe()
        assert {call["total"] for call in project.calls()} == {3}
        assert (document["total_batch_count"], document["total_batch_count_exact"]) == (3, True)
        assert document["batch_metrics"]["succeeded"] == 3

    def test_what_is_returned_is_written_in_input_order_where_there_is_an_output(self, project: Project) -> None:
        items = [f"item {number:03d}" for number in range(100)]
        job = project.run(item_list={"items": items, "batch_size": 7}, output=project.folder / "out")
        assert [json.loads(text) for text in job.to_pandas()["sample"]] == items

    def test_objects_can_be_kept_beside_what_is_returned(self, project: Project) -> None:
        items = [{"n": number, "x": None} for number in range(5)]
        output = {"path": str(project.folder / "out"), "keep": ["n"]}
        job = project.run(item_list={"items": items, "batch_size": 2}, output=output)
        assert job.to_pandas().to_dict("records") == [{"n": item["n"], "sample": json.dumps(item)} for item in items]

    def test_items_lie_in_the_job_directory_and_travel_in_no_task(self, project: Project) -> None:
        job = project.run(item_list={"items": ["needle" * 10] * 100, "batch_size": 10})
        holding = [path.name for path in Path(job.url).rglob("*") if path.is_file() and b"needle" in path.read_bytes()]
        assert holding == ["items-00000.jsonl"]

    def test_ids_do_not_change_with_attempts(self, project: Project) -> None:
        job = project.run(item_list={"items": list(range(8)), "batch_size": 1}, workers=1)
        expected = {batch_id(job.job_id, number, 0) for number in range(8)}
        assert {call["id"] for call in project.calls()} == expected

    def test_the_same_job_id_with_other_items_is_refused(self, project: Project) -> None:
        asked = {"item_list": {"items": [1, 2], "batch_size": 1}, "job_id": "nightly"}
        project.run(**asked)
        assert project.run(**asked).status == "succeeded"
        assert len(project.calls()) == 2
        with pytest.raises(cx.SpecError, match="exists with other settings"):
            project.run(**{**asked, "item_list": {"items": [1, 3], "batch_size": 1}})

    def test_more_than_a_megabyte_of_items(self, project: Project) -> None:
        items = [f"{number:06d}" + "x" * 100 for number in range(20_000)]
        with pytest.warns(UserWarning, match=r"the largest batch has .* KiB, Cortex takes 256 KiB"):
            job = project.run(item_list={"items": items, "batch_size": 4000}, output=project.folder / "out")
        assert job.describe()["total_batch_count"] == 5
        assert [json.loads(text) for text in job.to_pandas()["sample"]] == items


class TestFilePathLister:
    def test_a_sample_is_the_full_path(self, project: Project, bucket: str) -> None:
        job = project.run(file_path_lister={"s3_paths": [f"{bucket}/images/img"], "batch_size": 4})
        assert job.describe()["total_batch_count"] == 2
        assert project.batches() == [images(bucket, 0, 1, 2, 3), [*images(bucket, 4), f"{bucket}/images/img_5.jpg"]]

    def test_includes_then_excludes(self, project: Project, bucket: str) -> None:
        lister = {
            "paths": [f"{bucket}/images/"],
            "includes": ["**.png", "**.jpg"],
            "excludes": ["**/img_[0-2].*", "**/thumbs/**"],
            "batch_size": 10,
        }
        project.run(file_path_lister=lister)
        assert project.batches() == [[*images(bucket, 3, 4), f"{bucket}/images/img_5.jpg"]]

    def test_order_is_as_given_and_a_file_named_twice_comes_once(self, project: Project, bucket: str) -> None:
        prefixes = [f"{bucket}/images/thumbs/", f"{bucket}/images/img_4.png", f"{bucket}/images/"]
        lister = {"s3_paths": prefixes, "includes": ["**.png"], "batch_size": 100}
        project.run(file_path_lister=lister)
        thumb = f"{bucket}/images/thumbs/img_6.png"
        assert project.batches() == [[thumb, *images(bucket, 4, 0, 1, 2, 3)]]

    def test_nothing_matched_fails_while_enqueuing(self, project: Project, bucket: str) -> None:
        asked = {"file_path_lister": {"s3_paths": [f"{bucket}/images/"], "includes": ["*.gif"], "batch_size": 1}}
        file = project.folder / "job.json"
        file.write_text(json.dumps(asked))
        done = project.command("--job", file, "--job-id", "none")
        assert done.exit_code == 2
        assert "includes and excludes leave none of the" in done.output
        assert cx.Client().get_job("samples", "none").status == "failed while enqueuing"
        assert project.calls() == []


class TestDelimitedFiles:
    def test_a_sample_is_one_json_value_per_line_of_the_files(self, project: Project, bucket: str) -> None:
        output = project.folder / "out"
        job = project.run(delimited_files={"s3_paths": [f"{bucket}/lines/"], "batch_size": 3}, output=output)
        assert [json.loads(text) for text in job.to_pandas()["sample"]] == LINES
        assert sorted(project.batches(), key=json.dumps) == sorted([LINES[:3], LINES[3:6], LINES[6:]], key=json.dumps)
        assert {call["total"] for call in project.calls()} == {3}

    def test_a_malformed_line_becomes_a_dead_letter_with_file_and_line(self, project: Project) -> None:
        path = project.folder / "in.jsonl"
        path.write_text("1\n\noops\n2\n3\n4\n5\n")
        with pytest.warns(UserWarning, match="1 of 3 batches|1 failed|failed"):
            job = project.run(delimited_files={"paths": str(path), "batch_size": 2})
        document = job.describe()
        assert document["status"] == "completed with failures"
        assert project.batches() == [[1], [2, 3], [4, 5]]
        assert (document["total_batch_count"], document["batch_metrics"]["succeeded"]) == (3, 3)
        (failure,) = job.failures().to_dict("records")
        assert f"{path}, line 3: not JSON" in failure["error"]
        assert failure["payload"] == ["oops"]
        (message,) = job.logs(level="error")["message"]
        assert message.startswith(f"a line is malformed: {path}, line 3: not JSON")

    def test_the_log_names_the_first_malformed_lines_of_a_split(self, project: Project) -> None:
        path = project.folder / "in.jsonl"
        path.write_text("oops\n" * 100 + "1\n")
        with pytest.warns(UserWarning, match="failed"):
            job = project.run(delimited_files={"paths": str(path), "batch_size": 101}, workers=1)
        messages = list(job.logs(level="error")["message"])
        assert [message.split(": ")[1].rpartition(" ")[2] for message in messages[:10]] == [*map(str, range(1, 11))]
        assert messages[10:] == ["split 0 has more malformed lines: all of them are in the dead letter"]
        assert len(job.failures()) == 100

    def test_a_batch_of_malformed_lines_alone_is_not_handled(self, project: Project) -> None:
        path = project.folder / "in.jsonl"
        path.write_text("1\n2\n{\n}\n3\n")
        with pytest.warns(UserWarning, match="failed"):
            job = project.run(delimited_files={"paths": str(path), "batch_size": 2}, workers=1)
        assert project.batches() == [[1, 2], [3]]
        assert (job.describe()["batches_done"], job.describe()["total_batch_count"]) == (3, 3)

    def test_batches_that_cortex_would_refuse_are_worth_one_warning(
        self, project: Project, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = project.folder / "in.jsonl"
        path.write_text(f'"{"x" * 1000}"\n' * 600)
        project.run(delimited_files={"paths": str(path), "batch_size": 300})
        (line,) = [record.getMessage() for record in caplog.records if "Cortex takes" in record.getMessage()]
        assert line.startswith("delimited_files.batch_size: the largest batch has about 294 KiB")

    def test_keeping_fields_needs_objects(self, project: Project, bucket: str) -> None:
        asked = {"s3_paths": [f"{bucket}/other/"], "batch_size": 1}
        with pytest.warns(UserWarning, match="failed"):
            job = project.run(delimited_files=asked, output={"path": f"{bucket}/out", "keep": True}, max_attempts=1)
        assert "output.keep" in job.failures()["error"][0]


class TestFailuresAndRetries:
    def test_failed_batches_are_tried_again_exactly(self, project: Project) -> None:
        items = list(range(12))
        with pytest.warns(UserWarning, match="failed"):
            job = project.run(
                item_list={"items": items, "batch_size": 3},
                output=project.folder / "out",
                config={"fail": 4},
                max_attempts=2,
            )
        (failure,) = job.failures().to_dict("records")
        assert failure["payload"] == [3, 4, 5]
        before = len(project.calls())
        project.cured.touch()
        assert job.retry_failed().wait().status == "succeeded"
        (again,) = project.calls()[before:]
        assert (again["payload"], again["id"]) == ([3, 4, 5], failure["batch_id"])
        assert sorted(int(text) for text in job.to_pandas()["sample"]) == items

    def test_a_crash_costs_its_own_batch_only(self, project: Project) -> None:
        items = list(range(12))
        lister = {"items": items, "batch_size": 2}
        with pytest.warns(UserWarning, match="failed"):
            job = project.run(
                item_list=lister, output=project.folder / "out", config={"crash": 5}, max_attempts=2, workers=1
            )
        assert [int(text) for text in job.to_pandas()["sample"]] == [item for item in items if item not in (4, 5)]

    def test_an_interrupted_job_goes_on_with_the_same_plan(self, project: Project) -> None:
        folder = project.folder / "in"
        folder.mkdir()
        for number in range(6):
            (folder / f"{number}.png").write_text("x")
        lister = {"paths": f"{folder}/", "batch_size": 1}
        config = project.config(hold=str(folder / "3.png"))
        job = cx.submit(project.path, file_path_lister=lister, workers=1, config=config)
        deadline = time.monotonic() + 60
        while [str(folder / "3.png")] not in [call["payload"] for call in project.calls()]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        job.stop()
        assert job.status == "stopped"
        (folder / "7.png").write_text("x")  # is not in the plan
        project.cured.touch()
        assert job.resume().wait().status == "succeeded"
        handled = {sample for call in project.calls() for sample in call["payload"]}
        assert handled == {str(folder / f"{number}.png") for number in range(6)}


class TestDryRun:
    def test_it_lists_the_files_and_runs_nothing(self, project: Project, bucket: str) -> None:
        asked = {"file_path_lister": {"s3_paths": [f"{bucket}/images/"], "includes": ["**.png"], "batch_size": 4}}
        report: Any = cx.submit(project.path, job={**asked, "dryRun": True})
        assert [file.path for file in report.files] == [
            *images(bucket, 0, 1, 2, 3, 4),
            f"{bucket}/images/thumbs/img_6.png",
        ]
        assert (report.kind, report.rows, report.batches, report.exact) == ("file_path_lister", 6, 2, True)
        assert project.calls() == []
        assert not (project.folder / "store").exists()

    def test_on_the_command_line(self, project: Project, bucket: str) -> None:
        asked = {"delimited_files": {"s3_paths": [f"{bucket}/lines/"], "batch_size": 3}}
        text = project.command("--job", "-", "--dry-run", stdin=json.dumps(asked)).output
        assert "samples  8\n" in text
        assert "batches  3 of up to 3 samples" in text
        assert [line.split() for line in text.splitlines() if ".jsonl" in line] == [
            [f"{bucket}/lines/a.jsonl", "3", "22", "B"],
            [f"{bucket}/lines/b.jsonl.gz", "2", "24", "B"],
            [f"{bucket}/lines/c.jsonl", "3", "8", "B"],
            [f"{bucket}/lines/empty.jsonl", "0", "0", "B"],
        ]
        assert project.calls() == []
        told = json.loads(
            project.command("--job", "-", "-o", "json", stdin=json.dumps({**asked, "dryRun": True})).stdout
        )
        assert (told["rows"], told["batches"], len(told["files"])) == (8, 3, 4)
        assert not (project.folder / "store").exists()

    def test_of_items(self, project: Project) -> None:
        report: Any = cx.run(project.path, item_list={"items": [1, 2, 3], "batch_size": 2}, dry_run=True)
        assert (report.files, report.rows, report.batches) == ((), 3, 2)

    def test_a_sample_of_the_batches(self, project: Project, bucket: str) -> None:
        asked = {"file_path_lister": {"s3_paths": [f"{bucket}/images/img"], "batch_size": 2}}
        done = project.command("--job", "-", "--sample", 2, "-o", "json", "--output", "out", stdin=json.dumps(asked))
        told = json.loads(done.stdout)
        assert (told["batches"], told["rows_in"], told["rows_out"], told["total_rows"]) == (2, 4, 4, 6)
        assert project.batches() == [images(bucket, 0, 1), images(bucket, 2, 3)]


class TestDocuments:
    def test_json_and_yaml_and_options_over_them(self, project: Project) -> None:
        (project.folder / "job.yaml").write_text("item_list:\n  items: [1, {a: null}]\n  batch_size: 1\nworkers: 1\n")
        (project.folder / "job.json").write_text('{"item_list": {"items": [3, 4], "batch_size": 1}}')
        for name in ("job.yaml", "job.json"):
            done = project.command("--job", name, "--batch-size", 2)
            assert done.exit_code == 0, done.output
        assert project.batches() == [[1, {"a": None}], [3, 4]]

    def test_from_python(self, project: Project) -> None:
        job = {"item_list": {"items": [1, 2], "batch_size": 2}, "config": project.config(), "workers": 2}
        assert cx.run(project.path, job=job, workers=1, progress=False).settings.workers == 1
        assert project.batches() == [[1, 2]]

    def test_the_defaults_of_the_api(self, project: Project) -> None:
        with (project.path / "cortex.yaml").open("a") as file:
            file.write("  job:\n    file_path_lister: {s3_paths: data/, batch_size: 3}\n")
        (project.path / "data").mkdir()
        (project.path / "data/1.png").write_text("x")
        project.run()
        project.run(item_list={"items": [1], "batch_size": 1})
        assert project.batches() == [[str(project.path / "data/1.png")], [1]]

    @pytest.mark.parametrize(
        ("document", "words"),
        [
            ("{}", "input: is missing"),
            ("", "job.yaml: holds nothing; a submission is a mapping"),
            ("[1]", "job.yaml: holds a list"),
            (
                "item_list: {items: [1]}",
                "item_list.batch_size: is missing; item_list needs the keys items and batch_size",
            ),
            (
                "item_list: {items: [], batch_size: 1}",
                "job.yaml: item_list.items: found []; allowed is a list of at least one",
            ),
            (
                "item_list: {items: [1], batch_size: 0}",
                "job.yaml: item_list.batch_size: found 0; allowed is a whole number",
            ),
            ("item_lst: {items: [1]}", "job.yaml: item_lst: unknown key; did you mean item_list?"),
            ("file_path_lister: {s3_path: x, batch_size: 1}", "s3_path: unknown key; did you mean s3_paths?"),
            (
                "{item_list: {items: [1], batch_size: 1}, delimited_files: {s3_paths: x, batch_size: 1}}",
                "found the input kinds item_list and delimited_files; exactly one is allowed",
            ),
            (
                "file_path_lister: {s3_paths: x, excludes: ['**', '{a'], batch_size: 1}",
                "file_path_lister.excludes[1]: the pattern '{a' has a { at character 1 that no } closes",
            ),
            (
                "file_path_lister: {s3_paths: x, includes: '**', batch_size: 1}",
                "includes: found '**'; allowed is a list of globs",
            ),
            ("item_list: {items: [1], batch_size: 1}\nworkers: 0", "job.yaml: workers: found 0"),
            ("item_list: {items: [1], batch_size: 1}\ntimeout: 0.5", "job.yaml: timeout: found 0.5; allowed is"),
            (
                "item_list: {items: [1], batch_size: 1}\nsqs_dead_letter_queue: {max_receive_count: 1}",
                "sqs_dead_letter_queue.arn: is missing",
            ),
            (
                "item_list: {items: [1], batch_size: 1}\n"
                "sqs_dead_letter_queue: {arn: 'arn:aws:sqs:us-west-2:123456789012:q', max_receive_count: 0}",
                "sqs_dead_letter_queue.max_receive_count: found 0; allowed is a whole number from 1 on",
            ),
            ("item_list: {items: [1, 2", "job.yaml:2: this is no YAML"),
        ],
    )
    def test_what_is_wrong_is_said_with_file_and_key(self, project: Project, document: str, words: str) -> None:
        (project.folder / "job.yaml").write_text(document)
        done = project.command("--job", "job.yaml")
        assert done.exit_code == 2
        assert words in done.output
        assert "pydantic" not in done.output
        assert "Traceback" not in done.output

    def test_json_that_is_cut_off(self, project: Project) -> None:
        (project.folder / "job.json").write_text('{"item_list":\n {"items": [1, }}')
        done = project.command("--job", "job.json")
        assert (done.exit_code, "job.json:2:16: this is no JSON" in done.output) == (2, True), done.output
        assert "job: the file gone.json cannot be read: No such file" in project.command("--job", "gone.json").output
