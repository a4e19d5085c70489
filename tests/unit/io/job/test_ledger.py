"""The ledger: first record of a split wins, whoever appends, whatever fails in between."""

from __future__ import annotations

import threading
import uuid

import pytest

from cortex_dask.io.job.ledger import Ledger
from cortex_dask.io.job.records import BatchFailure, Part, SplitRecord
from cortex_dask.io.store.store import Store


def record(split: int, worker: str = "a") -> SplitRecord:
    part = Part(f"part-{split}", f"_temporary/{split}", 10, 100)
    failure = BatchFailure(3, "id", 2, 3, "exception", "ValueError: no")
    return SplitRecord(split, uuid.uuid4().hex, part, 4, 3, (failure,), "failures/x.jsonl", 3, 12, 10, worker=worker)


def test_records_come_back_as_they_were_appended(tmp_path):
    store = Store(str(tmp_path))
    records = [record(0), record(7), record(2)]
    ledger = Ledger(store)
    assert ledger.append(records[:2]).accepted == tuple(records[:2])
    assert ledger.append(records[2:]).accepted == (records[2],)
    assert list(Ledger(store).records()) == records
    assert 7 in ledger
    assert 1 not in ledger
    assert ledger.count == 3


def test_the_first_record_of_a_split_is_the_truth(tmp_path):
    ledger = Ledger(Store(str(tmp_path)))
    first, second = record(5), record(5)
    ledger.append([first])
    result = ledger.append([second])
    assert result.accepted == ()
    assert result.dropped == (second,)
    twice = [record(6), record(6)]
    result = ledger.append(twice)
    assert (result.accepted, result.dropped) == ((twice[0],), (twice[1],))


def test_two_coordinators_agree(tmp_path):
    ours, theirs = Ledger(Store(str(tmp_path))), Ledger(Store(str(tmp_path)))
    a, b = [record(0, "a"), record(1, "a")], [record(1, "b"), record(2, "b")]
    ours.append(a)
    result = theirs.append(b)
    assert result.accepted == (b[1],)
    assert result.dropped == (b[0],)
    assert result.foreign == tuple(a)
    assert list(ours.refresh()) == [b[1]]
    assert list(ours.records()) == list(theirs.records()) == [*a, b[1]]


@pytest.mark.parametrize("writers", [8])
def test_many_coordinators_at_once_leave_each_split_once(tmp_path, writers):
    accepted: list[SplitRecord] = []
    lock = threading.Lock()

    def coordinate(name: str) -> None:
        ledger = Ledger(Store(str(tmp_path)))
        for start in range(0, 60, 3):
            result = ledger.append([record(number, name) for number in range(start, start + 3)])
            with lock:
                accepted.extend(result.accepted)

    threads = [threading.Thread(target=coordinate, args=(str(number),)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(item.split for item in accepted) == list(range(60))
    assert sorted(item.split for item in Ledger(Store(str(tmp_path))).records()) == list(range(60))
    assert {item.attempt_id for item in accepted} == {
        item.attempt_id for item in Ledger(Store(str(tmp_path))).records()
    }


def test_an_append_that_took_effect_although_it_failed_is_found_again(tmp_path):
    store = Store(str(tmp_path))
    records = [record(0), record(1)]
    Ledger(store).append(records)  # as if its answer had been lost: the ledger below knows nothing of it
    ledger = Ledger(store)
    result = ledger.append(records)
    assert result.accepted == tuple(records)
    assert result.dropped == result.foreign == ()
    assert len(list(ledger.records())) == 2


def test_a_long_log_is_read_to_its_end(tmp_path):
    ledger = Ledger(Store(str(tmp_path)))
    for split in range(600):
        ledger.append([record(split)])
    assert [item.split for item in ledger.records()] == list(range(600))
    assert Ledger(Store(str(tmp_path))).count == 0


class CountingStore(Store):
    """A store that notes what is read."""

    __slots__ = ("reads",)
    reads: list[str]

    def read(self, name: str) -> bytes:
        self.reads.append(name)
        return super().read(name)


def test_to_catch_up_with_a_segment_takes_two_requests_or_three(tmp_path):
    store = CountingStore(str(tmp_path))
    store.reads = []
    ours, theirs = Ledger(store), Ledger(Store(str(tmp_path)))
    assert ours.is_empty()
    assert len(store.reads) == 1
    for split in range(100):
        theirs.append([record(split)])
    assert not ours.is_empty()
    assert len(list(ours.refresh())) == 100
    for split, most in ((100, 3), (101, 3)):
        theirs.append([record(split)])
        store.reads.clear()
        assert [item.split for item in ours.refresh()] == [split]
        assert len(store.reads) <= most
