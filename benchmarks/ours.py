"""cortex_dask, as its users run it: ``run`` with a class, with the commit, ledger, logs and progress switched on."""

from __future__ import annotations

from pathlib import Path

from workloads import run_of


class Handler:
    def __init__(self, config):
        from workloads import WORKLOADS

        self.model = WORKLOADS[config["workload"]].model(Path(config["data"]))
        self.marks = config["marks"]

    def handle_batch(self, payload):
        if self.marks:
            from workloads import mark

            mark(self.marks)
            self.marks = None
        return self.model(payload)


def main() -> None:
    run = run_of("cortex_dask")
    import cortex_dask as cx

    lines = run.workload.format == "json"
    job = cx.run(
        Handler,
        str(run.data / "input"),
        {"path": str(run.output), "format": "json" if lines else "parquet"},
        batch_size=run.workload.batch_size,
        batch_format="records" if lines else "numpy",
        workers=run.workers,
        config={
            "workload": run.workload.name,
            "data": str(run.data),
            "marks": run.marks,
        },
    )
    if job.status != "succeeded":
        raise SystemExit(f"the job ended as {job.status}")


if __name__ == "__main__":
    main()
