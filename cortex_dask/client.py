"""Submitting jobs and finding them again: ``run`` and ``submit`` for notebooks, and the client of one environment.

A submission is resolved, its job directory made, a coordinator started, and the job shown until it has ended.
The next file of this story is ``spec/resolution.py``, which resolves the submission.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from cortex_dask import environments, preview
from cortex_dask.catalog import Catalog
from cortex_dask.deployments import Deployments
from cortex_dask.display import Display, SilentDisplay, choose
from cortex_dask.environments import Environment
from cortex_dask.errors import JobRunningError, SpecError
from cortex_dask.io.job.logs import to_text
from cortex_dask.io.job.settings import ClusterSettings
from cortex_dask.io.job.status import COMPLETE_STATUSES
from cortex_dask.io.store.store import Store
from cortex_dask.job import Job
from cortex_dask.runtime.cluster import Cluster
from cortex_dask.runtime.worker.devices import capacity
from cortex_dask.spec import resolution
from cortex_dask.spec.resolution import ResolvedJob
from cortex_dask.spec.submission import Options, spelt_out

Target = type | str | Path
Input = str | Path | Sequence[str | Path]
Output = str | Path | Mapping[str, Any]

#: Clusters whose workers are started for the job.
_PAID_CLUSTERS = ("gateway", "kubernetes")


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
        Files, directories or globs, as local paths or URLs. None: those of ``cortex.yaml``.
    output : str, Path or mapping, optional
        A directory, as a local path or URL; or a mapping with the keys ``path``, ``format`` (parquet or json),
        ``schema`` and ``compression``. None: that of ``cortex.yaml``; without any the job writes no rows.
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
        Input columns that are written beside the returned ones.
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
        When it succeeded, or completed with failures (with a warning then).

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

    When this process exits before the job has ended, the job is stopped in good order (with a line on standard
    error) and can be resumed; :meth:`Job.wait` waits for it. With ``cluster="inline"`` it has ended when this returns.

    Takes what :func:`run` takes, but for ``progress``. A job that fails does not raise here but in :meth:`Job.wait`.
    """
    return Client(env).submit(target, input, output, cluster=cluster, **options)


class Client:
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
        #: The environment's name where commands in messages have to give it; None: the default environment.
        self._flag = env.name if isinstance(env, Environment) else env
        self.environment = env if isinstance(env, Environment) else environments.current(env)
        self._store = Store(self.environment.store)
        self.catalog = Catalog(self._store, self._flag)
        self.deployments = Deployments(self._store, self.catalog)

    def __repr__(self) -> str:
        return f"<Client {self.environment.name}: {self._store.url}>"

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
            return preview.dry_run(resolved)  # type: ignore[return-value]  # a report for those who ask for one
        display = choose(progress=progress, environment=self._flag)
        job = self.start(resolved, cluster=cluster, display=display)
        watch_job(job, display)
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
            return preview.dry_run(resolved)  # type: ignore[return-value]  # as above
        return self.start(resolved, cluster=cluster, display=SilentDisplay())

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
        """Start a job in a process of its own, which outlives this one, and return at once.

        Takes what :func:`cortex_dask.submit` takes. :meth:`Job.stop` stops it, from anywhere.
        """
        resolved = self.resolve(target, input, output, options)
        if resolved.dry_run:
            return preview.dry_run(resolved)  # type: ignore[return-value]  # as above
        return self.start(resolved, cluster=cluster, display=SilentDisplay(), detach=True)

    def resolve(self, target: Target, source: Input | None, output: Output | None, options: Options) -> ResolvedJob:
        """Check a submission and pack its project; nothing is written."""
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        cluster_options = _check_cluster_options(given.pop("cluster_options", {}))
        resolved = resolution.resolve(self.deployments.choose_target(target), input=source, output=output, **given)
        where = dataclasses.replace(resolved.settings.cluster, options=cluster_options)
        return dataclasses.replace(resolved, settings=dataclasses.replace(resolved.settings, cluster=where))

    def start(
        self,
        resolved: ResolvedJob,
        *,
        cluster: str | Cluster | None,
        display: Display,
        warn: Callable[[str], None] | None = None,
        detach: bool = False,
    ) -> Job:
        """Make the job or find it, and start its coordinator unless the job is complete or runs already.

        The coordinator runs in this process, or with ``detach`` in one of its own.
        """
        for warning in resolved.warnings:
            (warn or _warn)(warning)
        job, is_new = self.create(resolved, cluster=cluster)
        document = {} if is_new else job.describe()
        if is_new or not (document["status"] in COMPLETE_STATUSES or job.is_live(document)):
            if detach:
                job.start_detached()
            else:
                job.start(display=display)
        return job

    def create(self, resolved: ResolvedJob, *, cluster: str | Cluster | None = None) -> tuple[Job, bool]:
        """Make the job directory, or find that of the same submission; return the job and whether it is new."""
        resolved, job = self.place(resolved, cluster=cluster)
        return job, self.catalog.create(job, resolved)

    def place(self, resolved: ResolvedJob, *, cluster: str | Cluster | None = None) -> tuple[ResolvedJob, Job]:
        """Decide where a job runs and with how many workers, and return it with its handle; nothing is written."""
        used = cluster if isinstance(cluster, str) and cluster != "inline" else self.environment.cluster
        known = {"name": self.environment.name, "cluster": used}
        where = self._cluster_settings(resolved.settings.cluster, cluster)
        settings = dataclasses.replace(resolved.settings, environment=known, cluster=where)
        if not settings.workers_said and where.name in _PAID_CLUSTERS:
            settings = dataclasses.replace(settings, workers=1)  # as in Cortex: nothing costs money unasked
        elif not settings.workers_said and where.name == "local" and (most := capacity(settings.compute)):
            settings = dataclasses.replace(settings, workers=min(settings.workers, most))
        resolved = dataclasses.replace(resolved, settings=settings)
        return resolved, self.catalog.handle(settings.api_name, settings.job_id, cluster)

    def move(self, job: Job, *, cluster: str | None, options: Mapping[str, Any] | None = None) -> None:
        """Let a job that does not run be resumed on another cluster, or on one with other options."""
        if job.is_live():
            raise JobRunningError(f"the job {job.job_id} is running: stop it first, then let it go on elsewhere")
        before = job.settings
        given = dataclasses.replace(before.cluster, options=_check_cluster_options(options or {}))
        where = self._cluster_settings(given, cluster or before.cluster.name)
        job.move(dataclasses.replace(before, cluster=where))

    def _cluster_settings(self, given: ClusterSettings, cluster: str | Cluster | None) -> ClusterSettings:
        """Return where a job runs: the submission's options over those of the environment."""
        name = cluster if isinstance(cluster, str) else getattr(cluster, "name", None) or self.environment.cluster
        usual = self.environment.cluster_options if name == self.environment.cluster else {}
        return dataclasses.replace(
            given, name=name, options={**usual, **given.options}, gateway=dict(self.environment.gateway)
        )

    def list_jobs(self, api_name: str | None = None) -> list[Job]:
        """Return the jobs of one API, or of all, the newest first.

        Raises
        ------
        JobNotFoundError
            If the API has no jobs here.
        """
        return self.catalog.newest_first(api_name)

    def describe_jobs(self, api_name: str | None = None) -> list[dict[str, Any]]:
        """Return the status documents of :meth:`list_jobs`."""
        return [document for _, document in self.catalog.described(api_name)]

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
        return self.catalog.get(api_name, job_id)

    def stop_job(self, api_name: str, job_id: str) -> None:
        """Stop a job; see :meth:`Job.stop`."""
        self.get_job(api_name, job_id).stop()

    def stream_job_logs(self, api_name: str, job_id: str) -> Iterator[str]:
        """Yield the lines of a job's log as text until the job has ended."""
        yield from map(to_text, self.get_job(api_name, job_id).log_lines(follow=True))

    def deploy(
        self,
        api_spec: Mapping[str, Any] | str | os.PathLike[str],
        project_dir: str | os.PathLike[str] | None = None,
        force: bool = True,
        wait: bool = False,
    ) -> dict[str, Any]:
        """Deploy an API, or a new version of it; the same again changes nothing.

        ::

            client.deploy({"name": "digits", "kind": "BatchAPI", "handler": {"path": "handler.py"}}, "my-classifier")
            client.submit("digits", "data/in", "data/out")

        Parameters
        ----------
        api_spec : mapping, str or path
            The API as a mapping; or a project directory or its ``cortex.yaml``, with just one API in it.
        project_dir : str or path, optional
            The project directory, when the API is a mapping.
        force, wait : bool
            Accepted for compatibility with Cortex: no update is ever in progress here, and an API is ready at once.

        Returns
        -------
        dict
            ``api`` (see :meth:`get_api`), ``message`` and ``error`` (always empty: mistakes are raised).

        Raises
        ------
        SpecError, ProjectError, HandlerError
            If the configuration, the project or the handler cannot be used.
        """
        return self.deployments.deploy(api_spec, project_dir)

    def deploy_batch_api(
        self,
        api_spec: Mapping[str, Any],
        handler: type,
        requirements: Sequence[str] | None = None,
        conda_packages: Sequence[str] | None = None,
    ) -> dict[str, Any]:
        """Deploy an API with a class as its handler.

        Parameters
        ----------
        api_spec : mapping
            The API; ``handler.path`` may be left out.
        handler : type
            The class ``Handler``; it travels by value.
        requirements, conda_packages : list of str, optional
            What has to be installed for it: lines of ``requirements.txt`` and ``conda-packages.txt``.

        Returns
        -------
        dict
            As for :meth:`deploy`.

        Raises
        ------
        SpecError, HandlerError
            If the configuration or the class cannot be used.
        """
        return self.deployments.deploy_class(api_spec, handler, requirements, conda_packages)

    def patch(self, api_spec: Mapping[str, Any], force: bool = False) -> dict[str, Any]:
        """Give a deployed API another configuration; its project or class stays.

        Parameters
        ----------
        api_spec : mapping
            The whole new configuration, with the API's name.
        force : bool
            Accepted for compatibility with Cortex.

        Returns
        -------
        dict
            As for :meth:`deploy`.

        Raises
        ------
        JobNotFoundError
            If no such API is deployed.
        SpecError, ProjectError, HandlerError
            If the configuration does not fit the project.
        """
        return self.deployments.patch(api_spec)

    def get_api(self, api_name: str) -> dict[str, Any]:
        """Return a deployed API.

        Returns
        -------
        dict
            ``spec`` (its configuration, and ``id``), ``endpoint``, ``api_versions`` (``api_id`` and ``last_updated``,
            the newest first), ``batch_job_statuses`` (the status documents of its jobs, the newest first),
            ``created_time``, ``updated_time``.

        Raises
        ------
        JobNotFoundError
            If no such API is deployed.
        """
        return self.deployments.describe(api_name)

    def list_apis(self) -> list[dict[str, Any]]:
        """Return all deployed APIs, as :meth:`get_api` does."""
        return self.deployments.describe_all()

    def delete(self, api_name: str, keep_cache: bool = False) -> None:
        """Delete a deployed API and stop its jobs; jobs that have ended stay, with their logs and their output.

        A job whose own handler calls this is not stopped.

        Parameters
        ----------
        api_name : str
            The API's name.
        keep_cache : bool
            Whether its packed versions stay in the store.

        Raises
        ------
        JobNotFoundError
            If no such API is deployed.
        """
        self.deployments.delete(api_name, keep_cache=keep_cache)


def watch_job(job: Job, display: Display, on_interrupt: Callable[[], None] | None = None) -> dict[str, Any]:
    """Show a job until it has ended; when the user interrupts (or ends ``| head``), stop it if it runs here."""
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


def _check_cluster_options(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise SpecError(f"cluster_options: found a value of type {type(value).__name__}; a mapping is needed")
    options: dict[str, Any] = resolution.plain(value, "cluster_options")
    return options
