"""The exceptions that users see.

::

    CortexDaskError
    ├── InputError (ValueError)            what the user gave cannot be used: exit code 2
    │   ├── SpecError                      cortex.yaml, a submission, an option
    │   ├── ProjectError                   the project directory
    │   ├── HandlerError                   the Handler class: missing, wrong signature, syntax
    │   ├── DatasetError                   the input: nothing there, unreadable, conflicting schemas
    │   └── OutputError                    the output: holds data already, not writable
    ├── StorageError (OSError)             a store that cannot be reached or refuses
    ├── JobNotFoundError (LookupError)     no such API or job in this environment
    ├── JobRunningError                    another coordinator runs this job now
    ├── ClusterError                       a cluster that does not come up, or that was lost
    └── JobFailedError                     a job ended without a complete result
        ├── JobTimedOutError (TimeoutError)
        └── JobStoppedError

Every message is a sentence for the person who must act: what was found, where, what is allowed,
what to do next. The facts of a sentence that a program may need are attributes; None where they are not known.
"""

from __future__ import annotations

from collections.abc import Sequence


class CortexDaskError(Exception):
    """The base of every exception that cortex_dask raises on purpose."""


class InputError(CortexDaskError, ValueError):
    """What the user gave cannot be used; nothing was run."""


class SpecError(InputError):
    """A key of ``cortex.yaml``, of a submission or of an option is unknown or has an impossible value.

    Attributes
    ----------
    mistakes : list of (str, str)
        The path of each wrong key, and what is wrong with it; empty where the mistake is not about a key.
    """

    def __init__(self, message: str = "", *, mistakes: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.mistakes = list(mistakes)


class ProjectError(InputError):
    """The project directory cannot be packed."""


class HandlerError(InputError):
    """The ``Handler`` class is missing, does not load, or has a wrong signature."""


class DatasetError(InputError):
    """The input is missing, empty, unreadable, or its files contradict each other.

    Attributes
    ----------
    path : str, optional
        The path, URL or pattern in question.
    """

    def __init__(self, message: str = "", *, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path


class OutputError(InputError):
    """The output location holds data already or cannot be written.

    Attributes
    ----------
    url : str, optional
        The output directory.
    """

    def __init__(self, message: str = "", *, url: str | None = None) -> None:
        super().__init__(message)
        self.url = url


class StorageError(CortexDaskError, OSError):
    """A store cannot be reached, or refuses an operation after all retries.

    Attributes
    ----------
    url : str, optional
        The file or folder in question, without credentials.
    code : str, optional
        The store's own word for the fault, such as ``AccessDenied``.
    """

    def __init__(self, message: str = "", *, url: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.url, self.code = url, code


class JobNotFoundError(CortexDaskError, LookupError):
    """The environment has no such API or job.

    Attributes
    ----------
    api_name, job_id : str, optional
        What was looked for.
    """

    def __init__(self, message: str = "", *, api_name: str | None = None, job_id: str | None = None) -> None:
        super().__init__(message)
        self.api_name, self.job_id = api_name, job_id


class JobRunningError(CortexDaskError):
    """Another coordinator is running this job now.

    Attributes
    ----------
    host, pid : str and int, optional
        Where that coordinator runs, and its process id there.
    """

    def __init__(self, message: str = "", *, host: str | None = None, pid: int | None = None) -> None:
        super().__init__(message)
        self.host, self.pid = host, pid


class ClusterError(CortexDaskError):
    """A cluster does not come up, refuses the job, or was lost; the job can be resumed when it is mended.

    Attributes
    ----------
    cluster : str, optional
        The backend's name, or the scheduler's address.
    """

    def __init__(self, message: str = "", *, cluster: str | None = None) -> None:
        super().__init__(message)
        self.cluster = cluster


class JobFailedError(CortexDaskError):
    """A job ended without a complete result.

    Attributes
    ----------
    status : str
        The job's final status, one of the words of :data:`cortex_dask.job.STATUSES`.
    """

    def __init__(self, message: str, *, status: str = "worker error") -> None:
        super().__init__(message)
        self.status = status


class JobTimedOutError(JobFailedError, TimeoutError):
    """A job was stopped because its ``timeout`` had passed."""


class JobStoppedError(JobFailedError):
    """A job was stopped by a user."""
