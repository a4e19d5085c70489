"""The cache folder of a host, and what lies in it: projects, models and interpreters, each once for all jobs and slots.

The handler process imports this module, so it needs the standard library only (and PyYAML, where Dask's configuration
names the folder).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from cortex_dask.dask_config import configuration_files, configuration_places
from cortex_dask.errors import ProjectError

#: The environment variable and the key of Dask's configuration that name the folder.
_VARIABLE = "DASK_CORTEX_DASK__CACHE"
_SECTIONS = ("cortex-dask", "cortex_dask")  # Dask takes both spellings of a key

#: What the cache holds: folders of folders.
_KINDS = ("projects", "models", "interpreters")
_LOCK_POLL = 0.05  # seconds between two tries to lock what another process is filling
#: What no process has used for so long is removed (see :func:`prune`).
_UNUSED_DAYS = 14.0

#: Locks that this process holds on what it uses, until it ends.
_in_use: dict[str, int] = {}
_in_use_lock = threading.Lock()


def cache_root() -> str:
    """Return the cache folder of this host, for this user.

    The first of: the environment variable ``DASK_CORTEX_DASK__CACHE``; the key ``cortex-dask.cache`` in the files of
    Dask's configuration (read without importing Dask); ``$XDG_CACHE_HOME/cortex-dask``; the user's own cache folder; a
    folder of the user's in the temporary directory, where there is no home to write to.
    """
    named = os.environ.get(_VARIABLE) or _configured()
    if named:
        return str(Path(named).expanduser().absolute())
    if base := os.environ.get("XDG_CACHE_HOME"):
        return str(Path(base).absolute() / "cortex-dask")
    with contextlib.suppress(RuntimeError):  # no home at all
        home = Path.home()
        if os.access(home, os.W_OK):
            return str(home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "cortex-dask")
    return str(Path(tempfile.gettempdir()) / f"cortex-dask-{os.getuid()}")


def _configured() -> str | None:
    """Return ``cortex-dask.cache`` from Dask's configuration files; the later file wins, as in Dask."""
    found: str | None = None
    for place in configuration_places():
        with contextlib.suppress(OSError):
            for file in configuration_files(place):
                with contextlib.suppress(OSError):
                    text = file.read_text(encoding="utf-8", errors="replace")
                    if "cache" in text and any(section in text for section in _SECTIONS):
                        found = _read_key(text) or found
    return found


def _read_key(text: str) -> str | None:
    import yaml  # only where a file of Dask's configuration speaks of the cache

    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError:
        return None  # Dask itself complains about it where it is used
    for section in _SECTIONS:
        value = document.get(section) if isinstance(document, dict) else None
        if isinstance(value, dict) and isinstance(value.get("cache"), str):
            return str(value["cache"])
    return None


def hold(kind: str, key: str, fill: Callable[[Path], None], root: str | None = None) -> str:
    """Return the folder of that kind and key in the cache, filled unless this host has it already.

    Several processes may ask for it at once: one fills it, the others wait. It appears whole or not at all, only its
    owner may read it, and nobody removes it while this process lives.

    Parameters
    ----------
    kind : str
        A folder of the cache: ``projects`` or ``models``.
    key : str
        Names the content: hexadecimal digits.
    fill : callable
        Puts the content into the empty folder that it is given; called only where the content is not there yet.
    root : str, optional
        The cache folder; default: :func:`cache_root`.
    """
    place = _private_folder(Path(root or cache_root())) / kind
    place.mkdir(mode=0o700, exist_ok=True)
    target = place / key
    _use(place, key)
    if target.is_dir():
        return str(target)
    with _locked(place / f"{key}.lock") as locked:
        if target.is_dir():
            return str(target)
        if locked:  # nobody else is at work on it, so these are what killed processes left
            for left in place.glob(f".{key}.*"):
                shutil.rmtree(left, ignore_errors=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=place))  # mode 0700
        try:
            fill(fresh)
            try:
                fresh.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    prune(str(place.parent))
    return str(target)


def hold_in_place(
    kind: str,
    key: str,
    fill: Callable[[Path, int], None],
    is_whole: Callable[[Path], bool],
    check: Callable[[], None],
    root: str | None = None,
) -> str:
    """Return the folder of that kind and key, as :func:`hold` does, for content that cannot be moved.

    Parameters
    ----------
    kind, key, root
        As for :func:`hold`.
    fill : callable
        Makes the folder under its final name. Also given the descriptor of the lock: a program that inherits it keeps
        others away until it ends, even if this process is killed.
    is_whole : callable
        Whether the folder was filled to the end. One that was not is removed first.
    check : callable
        Called again and again while another process is at work on the folder; it raises to give up.
    """
    place = _private_folder(Path(root or cache_root())) / kind
    place.mkdir(mode=0o700, exist_ok=True)
    target = place / key
    _use(place, key)
    with (place / f"{key}.lock").open("ab") as lock:
        while not is_whole(target):
            check()
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(_LOCK_POLL)
                continue
            except OSError:  # a file system without locks
                pass
            if not is_whole(target):  # it may have been finished between the look and the lock
                if target.exists():
                    shutil.rmtree(target)
                fill(target, lock.fileno())
                prune(str(place.parent))
            break
    return str(target)


def prune(root: str | None = None, *, unused_days: float = _UNUSED_DAYS) -> list[str]:
    """Remove the projects, models and interpreters that no process uses and none has used for some time.

    Parameters
    ----------
    root : str, optional
        The cache folder; default: :func:`cache_root`.
    unused_days : float
        How long they must have been unused.

    Returns
    -------
    list of str
        The keys of what was removed.
    """
    place = Path(root or cache_root())
    removed = []
    for mark in (mark for kind in _KINDS for mark in (place / kind).glob("*.used")):
        with contextlib.suppress(OSError), mark.open("rb") as file:
            if time.time() - mark.stat().st_mtime < unused_days * 86_400:
                continue
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError while a process uses it
            # Renamed first: half of it must never be found under its name.
            doomed = Path(tempfile.mkdtemp(prefix=".removed.", dir=mark.parent))
            with contextlib.suppress(FileNotFoundError):
                mark.with_suffix("").rename(doomed / "content")
            shutil.rmtree(doomed, ignore_errors=True)
            mark.unlink(missing_ok=True)
            removed.append(mark.stem)
    return removed


def _private_folder(folder: Path) -> Path:
    """Make the cache folder; refuse one that belongs to somebody else."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = folder.stat().st_uid
    except OSError as error:
        raise ProjectError(
            f"the cache folder {folder} cannot be made: {error.strerror}; name another one in {_VARIABLE}"
        ) from None
    if owner not in (os.getuid(), 0):
        raise ProjectError(f"the cache folder {folder} belongs to another user; name another one in {_VARIABLE}")
    return folder


def _use(place: Path, key: str) -> None:
    """Note that this process uses what the key names from now on, so that nobody removes it."""
    mark = str(place / f"{key}.used")
    with _in_use_lock:
        while (held := _in_use.get(mark)) is None or not _same_file(held, mark):
            # Kept open on purpose: the lock lasts as long as the process. Opened again if somebody has just removed it.
            _in_use[mark] = os.open(mark, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(_in_use[mark], fcntl.LOCK_SH)
            if held is not None:
                os.close(held)
    with contextlib.suppress(OSError):
        os.utime(mark)


def _same_file(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))  # noqa: PTH116 - samestat wants its result
    except OSError:
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold an exclusive lock; yields False on a file system that has none."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
