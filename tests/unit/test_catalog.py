"""Finding jobs by their names: the latest one is right whatever the ids are, and few jobs are read for it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from cortex_dask.catalog import JobIndex
from cortex_dask.client import Client
from cortex_dask.environments import Environment
from cortex_dask.errors import JobNotFoundError
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.settings import HandlerSettings, JobSettings
from cortex_dask.io.job.splits import DatasetInput
from cortex_dask.io.store.store import Store

START = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Shelf:
    """An environment, and jobs that are put there at any time."""

    def __init__(self, folder: Path) -> None:
        self.client = Client(Environment("test", store=str(folder)))
        self.store = Store(str(folder))
        self.index = JobIndex(self.store)

    def put(self, job_id: str | None, created: datetime, *, noted: bool = True, api: str = "api") -> str:
        job_id = job_id or f"{created:%Y%m%d-%H%M%S}-{len(self.index.ids(api)):06x}"
        settings = JobSettings(
            job_id=job_id,
            api_name=api,
            api_id="1",
            created_time=created.isoformat(timespec="milliseconds"),
            handler=HandlerSettings("class"),
            dataset=DatasetInput(("in",)),
        )
        if noted:
            self.index.record_time(settings)
        JobDirectory(f"{self.store.url}/jobs/{api}/{job_id}").create(settings)
        return job_id

    def latest(self) -> str:
        return self.client.get_job("api", "latest").job_id


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all files that are read from now on."""
    names: list[str] = []
    original = Store.read

    def reading(store: Store, name: str) -> bytes:
        names.append(f"{store.url.rpartition('/')[2]}/{name}")
        return original(store, name)

    monkeypatch.setattr(Store, "read", reading)
    return names


def test_the_latest_of_many_jobs_is_one_read_away(shelf: Shelf, read: list[str]) -> None:
    ids = [shelf.put(None, START + timedelta(minutes=number)) for number in range(200)]
    assert not list((Path(shelf.store.url) / "jobs/api").glob(".*"))  # their ids tell
    read.clear()
    assert shelf.latest() == ids[-1]
    assert read == [f"{ids[-1]}/job.json"]


def test_ids_that_were_given_count_by_the_time_of_their_job(shelf: Shelf, read: list[str]) -> None:
    for number in range(100):
        shelf.put(f"night-{(number * 37) % 100:03d}", START + timedelta(hours=number))
        shelf.put(None, START + timedelta(hours=number, minutes=1))
    newest = shelf.put("a-name-that-sorts-first", START + timedelta(hours=200))
    read.clear()
    assert shelf.latest() == newest
    assert len(read) == 1
    assert newest in shelf.index.ids("api")
    assert not any(name.startswith(".") for name in shelf.index.ids("api"))
    newer = shelf.put(None, START + timedelta(hours=300))
    assert shelf.latest() == newer


def test_an_id_with_another_time_than_its_job(shelf: Shelf) -> None:
    shelf.put(None, START + timedelta(hours=1))
    copied = shelf.put(f"{START:%Y%m%d-%H%M%S}-00abcd", START + timedelta(hours=2))
    assert shelf.latest() == copied
    shelf.put(f"{START + timedelta(days=365):%Y%m%d-%H%M%S}-00abcd", START)
    assert shelf.latest() == copied
    shelf.put("20269999-999999-00abcd", START + timedelta(hours=3))
    assert shelf.latest() == "20269999-999999-00abcd"


def test_jobs_of_the_same_second(shelf: Shelf) -> None:
    for number, tail in enumerate(("ffffff", "000000", "888888", "123456")):
        created = START + timedelta(milliseconds=200 * number)
        newest = shelf.put(f"{created:%Y%m%d-%H%M%S}-{tail}", created)
    assert shelf.latest() == newest
    # made a second later, of an id that is a second older
    late = START + timedelta(milliseconds=1100)
    newest = shelf.put(f"{START:%Y%m%d-%H%M%S}-000001", late)
    assert shelf.latest() == newest


def test_jobs_that_nobody_noted_are_read(shelf: Shelf) -> None:
    shelf.put(None, START + timedelta(hours=5))
    shelf.put("copied-by-hand", START + timedelta(hours=6), noted=False)
    assert shelf.latest() == "copied-by-hand"
    shelf.put("older", START, noted=False)
    assert shelf.latest() == "copied-by-hand"


def test_what_is_no_job_is_passed_over(shelf: Shelf) -> None:
    job_id = shelf.put(None, START)
    shelf.store.write(f"jobs/api/{START + timedelta(days=1):%Y%m%d-%H%M%S}-00abcd/handler.pkl", b"")  # was cut off
    shelf.store.write(f"jobs/api/.{START + timedelta(days=2):%Y%m%d-%H%M%S}.never", b"")  # was cut off even earlier
    assert shelf.latest() == job_id
    assert [job.job_id for job in shelf.client.list_jobs("api")] == [job_id]
    assert [document["job_id"] for document in shelf.client.describe_jobs()] == [job_id]
    shelf.store.write("jobs/other/20260101-000000-00abcd/handler.pkl", b"")
    with pytest.raises(JobNotFoundError, match="there are no jobs of an API 'other'"):
        shelf.client.get_job("other", "latest")


def test_a_job_by_its_id_or_the_beginning_of_it(shelf: Shelf, read: list[str]) -> None:
    ids = [shelf.put(None, START + timedelta(minutes=number)) for number in range(20)]
    shelf.put(ids[3][:15], START)
    read.clear()
    assert shelf.client.get_job("api", ids[3]).job_id == ids[3]
    assert read == [f"{ids[3]}/job.json"]
    assert shelf.client.get_job("api", ids[3][:15]).job_id == ids[3][:15]  # whole before beginning
    assert shelf.client.get_job("api", ids[4][:15]).job_id == ids[4]
    with pytest.raises(JobNotFoundError, match=r"21 jobs of api begin with '2026'"):
        shelf.client.get_job("api", "2026")
    with pytest.raises(JobNotFoundError, match=r"no job '\.\./api'"):
        shelf.client.get_job("api", "../api")


def test_a_list_reads_one_document_of_each_job_that_has_ended(shelf: Shelf, read: list[str]) -> None:
    ids = [shelf.put(None, START + timedelta(minutes=number)) for number in range(30)]
    for job_id in ids[:-1]:
        directory = JobDirectory(f"{shelf.store.url}/jobs/api/{job_id}")
        created = directory.settings().created_time
        document = {"job_id": job_id, "api_name": "api", "status": "succeeded", "created_time": created}
        directory.write_json("status.json", document)
    shelf.put("elsewhere", START, api="other")
    read.clear()
    documents = shelf.client.describe_jobs("api")
    assert [document["job_id"] for document in documents] == ids[::-1]
    assert sorted(read) == sorted([*(f"{job_id}/status.json" for job_id in ids), f"{ids[-1]}/job.json"])
    assert len(shelf.client.describe_jobs()) == 31
