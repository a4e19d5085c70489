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
what to do next.
"""

from __future__ import annotations


class CortexDaskError(Exception):
    """The base of every exception that cortex_dask raises on purpose."""


class InputError(CortexDaskError, ValueError):
    """What the user gave cannot be used; nothing was run."""


class SpecError(InputError):
    """A key of ``cortex.yaml``, of a submission or of an option is unknown or has an impossible value."""


class ProjectError(InputError):
    """The project directory cannot be packed."""


class HandlerError(InputError):
    """The ``Handler`` class is missing, does not load, or has a wrong signature."""


class DatasetError(InputError):
    """The input is missing, empty, unreadable, or its files contradict each other."""


class OutputError(InputError):
    """The output location holds data already or cannot be written."""


class StorageError(CortexDaskError, OSError):
    """A store cannot be reached, or refuses an operation after all retries."""


class JobNotFoundError(CortexDaskError, LookupError):
    """The environment has no such API or job."""


class JobRunningError(CortexDaskError):
    """Another coordinator is running this job now."""


class ClusterError(CortexDaskError):
    """A cluster does not come up, refuses the job, or was lost; the job can be resumed when it is mended."""


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
