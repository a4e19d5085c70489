"""Submitting jobs, and finding them again: the client of one environment, and ``run`` and ``submit`` for notebooks.

The story of a submission: :func:`run` → :meth:`Client.begin` (resolve the submission, create the job directory) →
:meth:`Job.start <cortex_dask.job.Job.start>` → :func:`cortex_dask.runtime.coordinator.coordinator.run_job`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from cortex_dask.catalog import Catalog
from cortex_dask.deployments import ApiClient
from cortex_dask.display import Display, SilentDisplay, choose
from cortex_dask.errors import JobNotFoundError, JobRunningError, SpecError
from cortex_dask.io.job.directory import JobDirectory
from cortex_dask.io.job.settings import JobSettings
from cortex_dask.io.store.store import Store
from cortex_dask.job import Job
from cortex_dask.runtime.worker.devices import capacity
from cortex_dask.spec.submission import Options, spelt_out

if TYPE_CHECKING:
    from cortex_dask.environments import Environment
    from cortex_dask.io.job.settings import ClusterSettings
    from cortex_dask.preview import DryRun
    from cortex_dask.runtime.cluster import Cluster
    from cortex_dask.spec.resolution import ResolvedJob

Target = type | str | Path
Input = str | Path | Sequence[str | Path]
Output = str | Path | Mapping[str, Any]

#: Clusters whose workers are started for the job.
_BOUGHT = ("gateway", "kubernetes")


class Client(ApiClient):
    """The APIs and jobs of one environment.

    ::

        client = cx.Client()
        job = client.get_job("digits", "latest")
        client.list_jobs("digits")

    Parameters
    ----------
    env : str or Environment, optional
        The environment, or its name; None: the default one.
    """

    def __init__(self, env: str | Environment | None = None) -> None:
        if env is None or isinstance(env, str):
            from cortex_dask import environments

            self.environment, self._flag = environments.current(env), env
        else:
            self.environment, self._flag = env, env.name
        self._store = Store(self.environment.store)
        self._jobs = Catalog(self._store, self._flag)

    def __repr__(self) -> str:
        return f"<Client {self.environment.name}: {self._store.url}>"

    # submitting -----------------------------------------------------------------------------------------------------

    @spelt_out
    def run(
        self,
        target: Target,
        input: Input | None = None,
        output: Output | None = None,
        *,
        cluster: str | Cluster | None = None,
        progress: bool = True,
        **options: Unpack[Options],
    ) -> Job:
        """Run a job and wait for it; see :func:`cortex_dask.run`."""
        resolved = self.resolve(target, input, output, options)
        if resolved.dry_run:
            return _dry_run(resolved)  # type: ignore[return-value]  # only who asks for it gets a report
        display = choose(progress=progress, environment=self._flag)
        job = self.begin(resolved, cluster=cluster, display=display)
        attend(job, display)
        job.raise_unless_complete()
        return job

    @spelt_out
    def submit(
        self,
        target: Target,
        input: Input | None = None,
        output: Output | None = None,
        *,
        cluster: str | Cluster | None = None,
        **options: Unpack[Options],
    ) -> Job:
        """Start a job and return at once; see :func:`cortex_dask.submit`."""
        resolved = self.resolve(target, input, output, options)
        if resolved.dry_run:
            return _dry_run(resolved)  # type: ignore[return-value]  # only who asks for it gets a report
        return self.begin(resolved, cluster=cluster, display=SilentDisplay())

    @spelt_out
    def detach(
        self,
        target: Target,
        input: Input | None = None,
        output: Output | None = None,
        *,
        cluster: str | None = None,
        **options: Unpack[Options],
    ) -> Job:
        """Start a job in a process of its own, which goes on when this one ends, and return at once.

        Takes what :func:`cortex_dask.submit` takes. :meth:`Job.stop` stops it, from anywhere.
        """
        resolved = self.resolve(target, input, output, options)
        if resolved.dry_run:
            return _dry_run(resolved)  # type: ignore[return-value]  # as above
        return self.begin(resolved, cluster=cluster, display=SilentDisplay(), detach=True)

    def begin(
        self,
        resolved: ResolvedJob,
        *,
        cluster: str | Cluster | None,
        display: Display,
        warn: Callable[[str], None] | None = None,
        detach: bool = False,
    ) -> Job:
        """Make the job, or find it, and start its coordinator unless it is complete or runs already.

        The coordinator runs in this process, or with ``detach`` in one of its own.
        """
        for warning in resolved.warnings:
            (warn or _warn)(warning)
        job, is_new = self.create(resolved, cluster=cluster)
        document = {} if is_new else job.describe()
        if is_new or not (document["status"] in ("succeeded", "completed with failures") or job.is_live(document)):
            if detach:
                job.start_detached()
            else:
                job.start(display=display)
        return job

    def resolve(self, target: Target, source: Input | None, output: Output | None, options: Options) -> ResolvedJob:
        """Check a submission and pack its project; nothing is written."""
        from cortex_dask.spec import resolution

        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        made_of = _mapping(given.pop("cluster_options", {}))
        resolved = resolution.resolve(self._meant(target), input=source, output=output, **given)
        where = dataclasses.replace(resolved.settings.cluster, options=made_of)
        return dataclasses.replace(resolved, settings=dataclasses.replace(resolved.settings, cluster=where))

    def _meant(self, target: Any) -> Any:
        """Return the deployed API of this name, unless a project here is called like that."""
        from cortex_dask.spec.target import CONFIG_FILES

        if not isinstance(target, str):
            return target
        path = Path(target).expanduser()
        if path.is_file() or any((path / name).is_file() for name in CONFIG_FILES):
            return target
        return self.deployed_target(target) or target  # what is wrong with it is said as of any path

    def settle(self, resolved: ResolvedJob, *, cluster: str | Cluster | None = None) -> tuple[ResolvedJob, Job]:
        """Settle where a job runs and how large it is; and return it with its job; nothing is written."""
        used = cluster if isinstance(cluster, str) and cluster != "inline" else self.environment.cluster
        known = {"name": self.environment.name, "cluster": used}
        where = self._place(resolved.settings.cluster, cluster)
        settings = dataclasses.replace(resolved.settings, environment=known, cluster=where)
        if not settings.workers_said and where.name in _BOUGHT:
            settings = dataclasses.replace(settings, workers=1)  # as Cortex does: nothing costs money unasked
        elif not settings.workers_said and where.name == "local" and (most := capacity(settings.compute)):
            settings = dataclasses.replace(settings, workers=min(settings.workers, most))
        resolved = dataclasses.replace(resolved, settings=settings)
        return resolved, self._jobs.handle(settings.api_name, settings.job_id, cluster)

    def create(self, resolved: ResolvedJob, *, cluster: str | Cluster | None = None) -> tuple[Job, bool]:
        """Make the job directory.

        Returns
        -------
        Job, bool
            The job, and whether it is new. The same submission under the same job id gives the job that is there.

        Raises
        ------
        SpecError
            If another submission has this job id.
        """
        resolved, job = self.settle(resolved, cluster=cluster)
        settings, where = resolved.settings, resolved.settings.cluster
        directory = JobDirectory(job.url)
        try:
            before = directory.settings()
        except JobNotFoundError:
            self._jobs.index.note(settings)
            try:
                create_directory(directory, resolved)
            except FileExistsError:  # somebody has submitted it at the same moment
                check_same(directory.settings(), settings)
                return job, False
            return job, True
        check_same(before, settings)
        if before.cluster != where and not job.is_live():
            directory.move(dataclasses.replace(before, cluster=where, environment=settings.environment))
        return job, False

    def move(self, job: Job, *, cluster: str | None, options: Mapping[str, Any] | None = None) -> None:
        """Let a job that does not run go on elsewhere, when it is resumed.

        Parameters
        ----------
        job : Job
            The job.
        cluster : str, optional
            Where; None: where it was.
        options : mapping, optional
            How that cluster is made; they go over those of the environment.

        Raises
        ------
        JobRunningError
            If the job runs.
        """
        if job.is_live():
            raise JobRunningError(f"the job {job.job_id} is running: stop it first, then let it go on elsewhere")
        before = job.settings
        given = dataclasses.replace(before.cluster, options=_mapping(options or {}))
        JobDirectory(job.url).move(
            dataclasses.replace(before, cluster=self._place(given, cluster or before.cluster.name))
        )
        job.forget()

    def _place(self, given: ClusterSettings, cluster: str | Cluster | None) -> ClusterSettings:
        """Return where a job runs: what the submission says over what the environment says."""
        name = cluster if isinstance(cluster, str) else getattr(cluster, "name", None) or self.environment.cluster
        usual = self.environment.cluster_options if name == self.environment.cluster else {}
        return dataclasses.replace(
            given, name=name, options={**usual, **given.options}, gateway=dict(self.environment.gateway)
        )

    # finding --------------------------------------------------------------------------------------------------------

    def list_jobs(self, api_name: str | None = None) -> list[Job]:
        """Return the jobs of one API, or of all, the newest first.

        Raises
        ------
        JobNotFoundError
            If the API has no jobs here.
        """
        return self._jobs.newest_first(api_name)

    def describe_jobs(self, api_name: str | None = None) -> list[dict[str, Any]]:
        """Return the status documents of :meth:`list_jobs`."""
        return [document for _, document in self._jobs.described(api_name)]

    def get_job(self, api_name: str, job_id: str) -> Job:
        """Return a job.

        Parameters
        ----------
        api_name : str
            The API's name.
        job_id : str
            The job's id, the beginning of it if that is unambiguous, or ``"latest"``.

        Raises
        ------
        JobNotFoundError
            If there is none, or if several ids begin like this.
        """
        return self._jobs.get(api_name, job_id)

    def stop_job(self, api_name: str, job_id: str) -> None:
        """Stop a job; see :meth:`Job.stop`."""
        self.get_job(api_name, job_id).stop()

    def stream_job_logs(self, api_name: str, job_id: str) -> Iterator[str]:
        """Yield the lines of a job's log as text until the job has ended."""
        from cortex_dask.io.job.logs import to_text

        for line in self.get_job(api_name, job_id).log_lines(follow=True):
            yield to_text(line)


@spelt_out
def run(
    target: Target,
    input: Input | None = None,
    output: Output | None = None,
    *,
    cluster: str | Cluster | None = None,
    env: str | None = None,
    progress: bool = True,
    **options: Unpack[Options],
) -> Job:
    """Map a handler over a dataset and wait for the result.

    ::

        job = cx.run(Handler, "data/in", "data/out", batch_size=1024, workers=4, config={"threshold": 0.5})
        job = cx.run("my-classifier/cortex.yaml", "s3://bucket/in/", "s3://bucket/out/")

    Parameters
    ----------
    target : class, str or Path
        A class ``Handler`` (one defined in the notebook works), a project directory, or its ``cortex.yaml``.
    input : str, Path or list of them, optional
        Files, directories or globs, as local paths or URLs. None: what ``cortex.yaml`` says.
    output : str, Path or mapping, optional
        A directory, as a local path or URL; or a mapping with the keys ``path``, ``format`` (parquet or json),
        ``schema`` and ``compression``. None: what ``cortex.yaml`` says; without any the job writes no rows.
    batch_size : int
        Rows in a batch.
    batch_format : {"pandas", "pyarrow", "polars", "numpy", "records"}
        What ``handle_batch`` gets.
    columns : list of str
        Read only these.
    filters : list
        Read only rows that match, as pyarrow writes filters: ``[("x", ">", 5), ("y", "in", [1, 2])]``.
    format : {"auto", "parquet", "json"}
        The input's format.
    keep : bool or list of str
        Input columns that stand beside the returned ones.
    mode : {"error", "append", "overwrite"}
        What to do when the output directory holds data already.
    workers : int or mapping
        How many handler processes run at the same time; ``{"min": 0, "max": 20}``: as there is work for them.
    compute : mapping
        What a worker needs, over the API's ``compute``: ``cpu``, ``mem``, ``gpu``, ``inf``, ``node_groups``.
    cluster_options : mapping
        How the cluster is made; they go over those of the environment. For ``gateway``: the options of its server.
    config : dict
        Overrides the API's ``config``, key by key.
    timeout, batch_timeout, stall_timeout : float
        Seconds: for the job, for one batch, for a split without any progress.
    max_attempts : int
        How often a batch is tried.
    max_failed_batches : float or str
        Stop early when more fail: a number (``10``) or a share (``0.05``, ``"5%"``).
    item_list, file_path_lister, delimited_files : mapping
        The input, instead of ``input``: the samples themselves (``{"items": [...], "batch_size": 10}``), the paths of
        files, or the lines of files (``{"s3_paths": [...], "includes": ["**.jpg"], "batch_size": 10}``).
        ``handle_batch`` gets lists of samples then.
    job : mapping, str or Path
        A submission with any of these keys, or the JSON or YAML file that holds one; other arguments go over it.
    dry_run : bool
        Run nothing, and return a report on what would be processed instead of a job.
    cluster : str or Cluster, optional
        ``"local"``, ``"inline"`` (in the calling thread, for debuggers), or a scheduler's address. None: the
        environment's.
    job_id : str
        The same job id again attaches to the job, resumes it, or returns it when it is complete.
    name : str
        The API's name, for a class.
    api : str
        Which API, when ``cortex.yaml`` has several.
    env : str, optional
        The environment; None: the default one.
    progress : bool, default True
        Show how far the job is.

    Returns
    -------
    Job
        When it succeeded, or completed with failures (a warning says so).

    Raises
    ------
    InputError
        If something that was given cannot be used.
    JobFailedError, JobTimedOutError, JobStoppedError
        If the job ended without a complete result. It can be resumed.
    """
    return Client(env).run(target, input, output, cluster=cluster, progress=progress, **options)


@spelt_out
def submit(
    target: Target,
    input: Input | None = None,
    output: Output | None = None,
    *,
    cluster: str | Cluster | None = None,
    env: str | None = None,
    **options: Unpack[Options],
) -> Job:
    """Start a job in the background of this process, and return at once.

    ::

        job = cx.submit(Handler, "data/in", "data/out", batch_size=1024)
        job.progress
        job.wait()

    When this process exits before the job has ended, the job is stopped in good order (a line on standard error says
    so) and can be resumed; :meth:`Job.wait` waits for it. With ``cluster="inline"`` it has ended when this returns.

    Takes what :func:`run` takes, but for ``progress``. A job that fails does not raise here but in :meth:`Job.wait`.
    """
    return Client(env).submit(target, input, output, cluster=cluster, **options)


def create_directory(directory: JobDirectory, resolved: ResolvedJob) -> None:
    """Write what makes a job: handler and items first, then ``job.json``, for no job exists without them.

    Raises
    ------
    FileExistsError
        If the directory holds a job already.
    """
    if resolved.archive is not None:
        directory.store.write(f"project/{resolved.archive.hash}.tar.gz", resolved.archive.data)
    if resolved.pickled is not None:
        directory.store.write("handler.pkl", resolved.pickled)
    if resolved.items is not None:
        resolved.items.write(directory.store)
    directory.create(resolved.settings)


def _dry_run(resolved: ResolvedJob) -> DryRun:
    from cortex_dask import preview

    return preview.dry_run(resolved)


def attend(job: Job, display: Display, on_interrupt: Callable[[], None] | None = None) -> dict[str, Any]:
    """Show a job until it has ended.

    When the user interrupts, or nobody reads what is shown any more (``| head``), a job that runs in this process is
    stopped in good order before the interrupt goes on; one that another process runs is left alone.
    """
    try:
        return job.watch(display)
    except (KeyboardInterrupt, BrokenPipeError) as error:
        if job.is_run_here:
            if on_interrupt is not None and not isinstance(error, BrokenPipeError):
                on_interrupt()
            job.stop()
        raise


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=4)  # the caller of run or submit


def _mapping(value: Any) -> dict[str, Any]:
    from cortex_dask.spec.resolution import plain

    if not isinstance(value, Mapping):
        raise SpecError(f"cluster_options: found a value of type {type(value).__name__}; a mapping is needed")
    made: dict[str, Any] = plain(value, "cluster_options")
    return made


#: Settings that two submissions of the same job may differ in.
_INCIDENTAL = ("api_id", "cluster", "created_time", "environment", "workers_said")
#: Settings whose values are the user's own and are never shown.
_PRIVATE = ("config", "handler.env", "job_config")


def check_same(existing: JobSettings, new: JobSettings) -> None:
    """Compare a submission with the job that has its id.

    Raises
    ------
    SpecError
        If they differ in more than what may change.
    """
    differences = list(_differences(existing.to_json(), new.to_json()))
    if differences:
        raise SpecError(
            f"job_id: the job {new.job_id!r} of {new.api_name} exists with other settings ({'; '.join(differences)}): "
            "choose another job id, or submit the same as before to attach to it or resume it"
        )


def _differences(existing: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted({*existing, *new}):
        path = f"{prefix}{key}"
        old, now = existing.get(key), new.get(key)
        if isinstance(old, tuple):
            old = list(old)
        if isinstance(now, tuple):
            now = list(now)
        if old == now or path in _INCIDENTAL:
            continue
        if path in _PRIVATE:
            yield f"{path} differs"
        elif isinstance(old, Mapping) and isinstance(now, Mapping):
            yield from _differences(old, now, f"{path}.")
        else:
            yield f"{path} was {old!r}, is {now!r}"
