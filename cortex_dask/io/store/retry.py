"""``persist``: a request to a store is tried again while that may help, and its failure explained."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from cortex_dask.errors import CortexDaskError, StorageError
from cortex_dask.io.store.errors import error_code, explain, is_transient, shown_url

if TYPE_CHECKING:
    pass

_T = TypeVar("_T")

#: Seconds before each further try of a failed request; with what botocore itself retries, that outlasts a throttled
#: prefix and a server's restart of some seconds. What takes longer is for the coordinator, which sends the split again.
RETRY_DELAYS = (0.1, 0.3, 0.9, 2.7)

#: Errors of a program, not of a store: they keep their class.
_BUGS = (TypeError, AttributeError, LookupError, NameError, AssertionError, NotImplementedError)


#: Service codes that come as FileNotFoundError and mean something else than a missing file.
_NOT_ABOUT_A_FILE = ("NoSuchBucket", "ContainerNotFound", "NoSuchUpload")


def persist(request: Callable[[], _T], url: str, *, writes: bool = False, once: bool = False) -> _T:
    """Make a request again while it fails in a way that may pass, then raise the error that a user can act on.

    Parameters
    ----------
    request : callable
        The request; it must be safe to repeat, unless ``once`` is set.
    url : str
        What it is about, for the message.
    writes : bool
        Whether it makes a file: then a missing file can only mean a missing bucket.
    once : bool
        Whether the request must not be repeated as it is.
    """
    delays = iter(() if once else RETRY_DELAYS)
    while True:
        try:
            return request()
        except Exception as error:
            again = is_transient(error) and not isinstance(error, CortexDaskError)  # those have been through here
            delay = next(delays, None) if again else None
            if delay is None:
                surfaced = _surfaced(error, url, writes=writes)
                if surfaced is error:
                    raise
                raise surfaced from error
            import random  # only here: it takes longer to import than this module

            time.sleep(delay * random.uniform(0.5, 1.5))  # noqa: S311  # jitter is no secret


def _surfaced(error: Exception, url: str, *, writes: bool) -> Exception:
    """Return the error to raise: builtin where callers handle it, else one that explains itself."""
    if isinstance(error, (CortexDaskError, *_BUGS)):
        return error
    if isinstance(error, FileExistsError):
        return FileExistsError(errno.EEXIST, "there is such a file already", shown_url(url))
    if isinstance(error, FileNotFoundError) and error_code(error) not in _NOT_ABOUT_A_FILE:
        if writes:
            missing = "its bucket or container does not exist" if "://" in url else "its folder cannot be made"
            return StorageError(f"{shown_url(url)} cannot be written: {missing}")
        return FileNotFoundError(errno.ENOENT, "there is no such file", shown_url(url))
    return explain(error, url)
