"""What a store's error means: whether to try again, and the sentence to show.

Stores fail in the words of some library (botocore, aiohttp, the operating system). Those libraries are never imported
here: an error is recognised by its class name, its service's error code, its HTTP status or its ``errno``, so that a
process which only uses local files never pays for them.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from typing import Any

from cortex_dask.errors import CortexDaskError, InputError, StorageError


class StoreAccessError(StorageError, PermissionError):
    """A store refuses access: the credentials or the permissions are not enough."""


# error codes of S3 and of the stores that speak its language:
# https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
_TRANSIENT_CODES = frozenset(
    {
        "BandwidthLimitExceeded",
        "ConditionalRequestConflict",
        "InternalError",
        "NoSuchUpload",  # the upload was completed or aborted by a request whose answer was lost
        "OperationAborted",
        "PriorRequestNotComplete",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
        "XAmzContentSHA256Mismatch",
        *("408", "429", "500", "502", "503", "504"),
    }
)
_TRANSIENT_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
# connections that broke or timed out, as botocore, aiohttp, urllib3, fsspec and the SDKs of Google and Azure name them
_TRANSIENT_CLASSES = frozenset(
    {
        "ClientConnectionError",
        "ClientConnectionResetError",
        "ClientOSError",
        "ClientPayloadError",
        "ConnectTimeoutError",
        "ConnectionClosedError",
        "EndpointConnectionError",
        "FSTimeoutError",
        "HTTPClientError",
        "IncompleteRead",
        "IncompleteReadError",
        "ProtocolError",
        "ReadTimeoutError",
        "ResponseParserError",
        "ResponseStreamingError",
        "ServerDisconnectedError",
        "ServerTimeoutError",
        "ServiceRequestError",
        "ServiceResponseError",
        "TransportError",
        "gaierror",
    }
)
_FINAL_CLASSES = frozenset(
    {
        "SSLError",
        "ClientSSLError",
        "ClientConnectorCertificateError",
        "ProxyConnectionError",
        "InvalidProxiesConfigError",
    }
)
_TRANSIENT_ERRNOS = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,  # s3fs: ServiceUnavailable, SlowDown
        errno.ESTALE,  # a network file system's server came back
        errno.ETIMEDOUT,
        getattr(errno, "EREMOTEIO", errno.ETIMEDOUT),  # s3fs: InternalError
    }
)

_NO_CREDENTIALS = frozenset(
    {
        "CredentialRetrievalError",
        "DefaultCredentialsError",
        "NoAuthTokenError",
        "NoCredentialsError",
        "PartialCredentialsError",
        "ProfileNotFound",
        "SSOTokenLoadError",
        "TokenRetrievalError",
        "UnauthorizedSSOTokenError",
    }
)
_WRONG_CREDENTIALS = frozenset(
    {
        "AuthFailure",
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidAccessKeyId",
        "InvalidClientTokenId",
        "InvalidSecurity",
        "InvalidToken",
        "SignatureDoesNotMatch",
        "TokenRefreshRequired",
        "UnrecognizedClientException",
    }
)
_WRONG_REGION = frozenset(
    {
        "AuthorizationHeaderMalformed",
        "IllegalLocationConstraintException",
        "PermanentRedirect",
        "Redirect",
        "301",
        "307",
    }
)
_UNREACHABLE = frozenset(
    {
        "ClientConnectorDNSError",
        "ClientConnectorError",
        "ConnectTimeoutError",
        "EndpointConnectionError",
        "ServiceRequestError",
    }
)

#: The package that brings a protocol's file system, where fsspec itself does not.
_PACKAGES = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "az": "adlfs",
    "adl": "adlfs",
    "sftp": "paramiko",
    "ssh": "paramiko",
    "smb": "smbprotocol",
    "http": "aiohttp",
    "https": "aiohttp",
    "oci": "ocifs",
    "oss": "ossfs",
    "hf": "huggingface_hub",
    "webhdfs": "requests",
    "github": "requests",
    "box": "boxfs",
    "dropbox": "dropboxdrivefs",
    "lakefs": "lakefs-spec",
}
_CREDENTIALS_HINT = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or give the machine a role",
    "gcs": "set GOOGLE_APPLICATION_CREDENTIALS, or sign in with `gcloud auth application-default login`",
    "abfs": "set AZURE_STORAGE_ACCOUNT_NAME and a key, or AZURE_STORAGE_CONNECTION_STRING",
}
_FAMILIES = {"s3a": "s3", "gs": "gcs", "az": "abfs", "abfss": "abfs", "adl": "abfs"}


def shown_url(url: str) -> str:
    """Return a URL as it may be shown: without ``user:password@``, and without a query, which may hold a signature.

    Examples
    --------
    >>> shown_url("sftp://ann:secret@host/data")
    'sftp://host/data'
    """
    if "://" not in url:
        return url
    text = _scrub(url)
    return text.partition("?")[0] if text.startswith(("http://", "https://")) else text


def _scrub(text: str) -> str:
    """Take ``user:password@`` out of every URL in a text (a lone ``container@`` is an Azure container and stays)."""
    return re.sub(r"(?<=://)[^/\s@:]*:[^/\s]*@", "", text)


def error_code(error: BaseException) -> str:
    """Return the storage service's own code for an error, such as ``NoSuchBucket``; empty where there is none."""
    for link in _chain(error):
        response = getattr(link, "response", None)
        if isinstance(response, dict) and isinstance(response.get("Error"), dict):
            return str(response["Error"].get("Code") or "")
        code = getattr(link, "error_code", None)  # Azure
        if isinstance(code, str):
            return code
    return ""


def transient_code(code: str) -> bool:
    """Return whether a storage service's error code says that trying again may help."""
    return code in _TRANSIENT_CODES


def is_transient(error: BaseException) -> bool:
    """Return whether trying again may help: throttling, a server's fault, a connection that broke or timed out."""
    if error_code(error) in _TRANSIENT_CODES:
        return True
    for link in _chain(error):
        names = {cls.__name__ for cls in type(link).__mro__}
        if names & _FINAL_CLASSES:
            return False
        if isinstance(link, (FileNotFoundError, FileExistsError, PermissionError)):
            return False
        if names & _TRANSIENT_CLASSES or _status(link) in _TRANSIENT_STATUSES:
            return True
        if isinstance(link, (ConnectionError, TimeoutError)):
            return True
        if isinstance(link, OSError) and link.errno in _TRANSIENT_ERRNOS:
            return True
    return False


def explain(error: BaseException, url: str) -> CortexDaskError:
    """Return the error as one sentence for the person who must act.

    Parameters
    ----------
    error : BaseException
        What a store, fsspec or the operating system raised.
    url : str
        What was being used; shown without credentials.

    Returns
    -------
    CortexDaskError
        ``error`` itself if it explains itself already; an :class:`~cortex_dask.errors.InputError` where the URL cannot
        be used at all (unknown protocol, missing package); otherwise a :class:`~cortex_dask.errors.StorageError`
        (access refused: also a ``PermissionError``), with ``errno`` kept where there was one.
    """
    if isinstance(error, CortexDaskError):
        return error
    where = shown_url(url)
    explained = _unusable(error, where) or _service(error, where) or _system(error, where)
    if explained is None:
        kind = _meaning(error)
        explained = StorageError(f"{where} cannot be used: {kind}")
    number = next((link.errno for link in _chain(error) if isinstance(link, OSError) and link.errno), None)
    if isinstance(explained, StorageError):
        explained.url, explained.code = where, error_code(error) or None
        if number is not None:
            explained.errno = number
    explained.__cause__ = error
    return explained


def _unusable(error: BaseException, where: str) -> CortexDaskError | None:
    """Explain a URL that no installed file system takes."""
    protocol = where.partition("://")[0]
    if isinstance(error, ImportError):
        package = _PACKAGES.get(protocol)
        if package is None:
            return InputError(f"{where} needs a package that is not installed: {_meaning(error)}")
        return InputError(
            f"{where} needs the package {package}, which is not installed here: run `pip install {package}`"
        )
    if isinstance(error, ValueError) and "protocol not known" in str(error).lower():
        import difflib

        near = difflib.get_close_matches(protocol, ["file", "memory", *_PACKAGES], n=1)
        hint = f"did you mean {near[0]}://? " if near else ""
        return InputError(
            f"{where} has the unknown protocol {protocol!r}: {hint}Allowed are local paths and the protocols of "
            "fsspec, such as s3, gs, abfs, sftp"
        )
    return None


def _service(error: BaseException, where: str) -> CortexDaskError | None:
    """Explain what an object store or the way to it answered."""
    code = error_code(error)
    names = {cls.__name__ for link in _chain(error) for cls in type(link).__mro__}
    protocol = where.partition("://")[0]
    hint = _CREDENTIALS_HINT.get(
        _FAMILIES.get(protocol, protocol), "set them in the environment or in fsspec's configuration"
    )
    bucket = _bucket(where)
    if names & _NO_CREDENTIALS:
        return StoreAccessError(f"there are no credentials for {where}: {hint}")
    if code in _WRONG_CREDENTIALS:
        return StoreAccessError(
            f"the credentials for {where} were refused ({code}): check that they are right and have not expired; {hint}"
        )
    if code in ("RequestTimeTooSkewed", "RequestExpired"):
        return StoreAccessError(f"{where} refuses requests because this machine's clock is wrong ({code}): set it")
    if code in ("NoSuchBucket", "ContainerNotFound"):
        return StorageError(f"the bucket {bucket} does not exist: check its name and the endpoint, or create it")
    if code == "NoSuchUpload":
        return StorageError(f"the unfinished upload of {where} was aborted by somebody else: write it again")
    if code == "InvalidBucketName" or "Invalid bucket name" in str(error):
        return StorageError(f"{bucket!r} is not a possible bucket name: check {where}")
    if code in _WRONG_REGION:
        return StorageError(
            f"the bucket {bucket} is in another region ({code}): set AWS_DEFAULT_REGION to the bucket's region"
        )
    if code in ("AccessDenied", "AllAccessDisabled", "AccountProblem", "AuthorizationPermissionMismatch", "403"):
        return StoreAccessError(
            f"access to {where} is denied ({code}): the credentials in use are wrong, or lack the permission to read, "
            "write, list and delete there"
        )
    if code in ("QuotaExceeded", "XMinioStorageFull", "InsufficientStorage"):
        return StorageError(f"no space is left on {where} ({code}): free some, or choose another place")
    if names & {"SSLError", "ClientSSLError", "ClientConnectorCertificateError"}:
        return StorageError(
            f"no secure connection to {where}: {_meaning(error)}; check the endpoint and the certificates"
        )
    if names & _UNREACHABLE or names & {"gaierror", "ConnectionRefusedError"}:
        return StorageError(
            f"the server of {where} cannot be reached: {_meaning(error)}; check the endpoint and the network"
        )
    if "Invalid endpoint" in str(error):
        return StorageError(f"the endpoint of {where} is not a URL: {_meaning(error)}; check AWS_ENDPOINT_URL")
    if is_transient(error):
        return StorageError(f"{where} failed again and again: {_meaning(error)}; try again later")
    return None


def _system(error: BaseException, where: str) -> CortexDaskError | None:
    """Explain what the operating system answered."""
    number = next((link.errno for link in _chain(error) if isinstance(link, OSError) and link.errno), None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"no space is left for {where}: free some, or choose another place")
    if number == errno.EFBIG:
        return StorageError(f"{where} would be larger than its file system or the user's limit allows")
    if number == errno.EROFS:
        return StorageError(f"{where} is on a read-only file system: choose another place")
    if isinstance(error, PermissionError):
        return StoreAccessError(f"access to {where} is denied: check its owner and permissions")
    if isinstance(error, NotADirectoryError):
        return StorageError(f"{where} cannot be used: a part of its path is a file, not a directory")
    if isinstance(error, IsADirectoryError):
        return StorageError(f"{where} is a directory, not a file")
    if number == errno.ENAMETOOLONG:
        return StorageError(f"the name {where} is too long for its file system")
    if isinstance(error, FileExistsError):
        return StorageError(f"{where} exists already")
    if isinstance(error, FileNotFoundError):
        return StorageError(f"{where} does not exist")
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what it was raised from."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    """Return the HTTP status that an error carries under one of the usual names."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        value = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return value if isinstance(value, int) else None
    for name in ("status", "status_code", "code", "http_status"):
        value = getattr(error, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None


def _bucket(where: str) -> str:
    return where.partition("://")[2].partition("/")[0]


def _meaning(error: BaseException) -> str:
    """Return an error's own words on one line, without credentials."""
    text = _scrub(" ".join(str(error).split()))
    return text or type(error).__name__
