"""The numbers of a status document."""

from datetime import UTC, datetime

from cortex_dask.io.job.status import Progress


def document(**changes):
    return {
        "status": "running",
        "total_batch_count": 40,
        "total_batch_count_exact": True,
        "worker_counts": {"running": 4},
        "eta": 12.0,
        "start_time": "2026-01-31T12:00:00.000+00:00",
        **changes,
    }


def test_it_reads_a_status_document():
    now = datetime(2026, 1, 31, 12, 0, 30, tzinfo=UTC)

    found = Progress.from_status(document(batches_done=10, failed_batches=2), now=now)

    assert (found.batches_done, found.batches_total, found.failed_batches) == (10, 40, 2)
    assert (found.share, found.seconds, found.eta, found.workers) == (0.25, 30.0, 12.0, 4)


def test_an_estimated_total_is_marked_and_never_reached_while_running():
    found = Progress.from_status(document(batches_done=45, total_batch_count_exact=False))

    assert found.batches_words() == "45 of ~45 batches"
    assert found.share == 0.99


def test_an_empty_document_is_a_job_that_has_not_begun():
    found = Progress.from_status({})

    assert (found.status, found.batches_total, found.share, found.seconds) == ("enqueuing", None, None, None)
