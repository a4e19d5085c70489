"""The project directory: which of its files a job takes along, and the archive that they travel in.

The archive is a gzipped tar file. Its hash is that of the tar stream, which depends on the files' names, contents and
executable bits alone: the same files have the same hash, whatever their order, time stamps and owners.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import posixpath
import stat
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from cortex_dask.errors import ProjectError
from cortex_dask.io.cache import hold
from cortex_dask.project.dotenv import DOTENV_FILE, read_dotenv

if TYPE_CHECKING:
    from cortex_dask.project.ignore import IgnoreRules

#: An unpacked project may be this large; ``pack`` refuses far smaller ones, so this only stops a forged archive.
_UNPACKED_LIMIT = 1 << 30


# projects -----------------------------------------------------------------------------------------------------------


def unpack(source: bytes | Callable[[], bytes], content_hash: str, root: str | None = None) -> str:
    """Unpack a project archive, unless this host has it already, and return the project's directory.

    Several processes may do so at once: one unpacks, the others wait for it. The directory appears whole or not at all,
    and only its owner may read it (it holds the project's ``.env``).

    Parameters
    ----------
    source : bytes or callable
        The archive, or what fetches it; called only where the project is not there yet.
    content_hash : str
        The archive's hash, as :class:`cortex_dask.project.archive.Archive` has it; what is unpacked is
        checked against it.
    root : str, optional
        The cache folder; default: :func:`cache_root`.

    Raises
    ------
    ProjectError
        If the archive is damaged, is not the one that the hash names, or holds a path or link that leaves the
        directory.
    """
    if len(content_hash) != 64 or not set(content_hash) <= set("0123456789abcdef"):
        raise ProjectError(f"{content_hash!r} is no project hash: 64 hexadecimal digits are expected")

    def fill(folder: Path) -> None:
        _extract(_decompress(source if isinstance(source, bytes) else source(), content_hash), folder)

    return hold("projects", content_hash, fill, root)


def _decompress(data: bytes, content_hash: str) -> bytes:
    try:
        with gzip.open(io.BytesIO(data)) as file:
            content = file.read(_UNPACKED_LIMIT + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise ProjectError(f"the project archive {content_hash} is damaged: {error}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != content_hash:
        raise ProjectError(f"the project archive {content_hash} is damaged: its content has the hash {found}")
    return content


def _extract(content: bytes, folder: Path) -> None:
    try:
        with tarfile.open(
            fileobj=io.BytesIO(content), mode="r:", encoding="utf-8", errors="surrogateescape"
        ) as archive:
            members = archive.getmembers()
            _check_members(members)
            if hasattr(tarfile, "data_filter"):  # Python 3.11.4 and later
                archive.extraction_filter = tarfile.data_filter
            # Links come last, so that nothing is ever written through one.
            archive.extractall(folder, sorted(members, key=lambda member: member.issym()))  # noqa: S202 - checked above
    except tarfile.TarError as error:
        raise ProjectError(f"the project archive cannot be unpacked: {error}") from None
    env = folder / ".env"
    if env.is_file() and not env.is_symlink():
        env.chmod(stat.S_IRUSR | stat.S_IWUSR)


def _check_members(members: list[Any]) -> None:
    """Refuse whatever :func:`cortex_dask.project.archive.pack` does not write."""
    solid = {"."} | {member.name for member in members if member.isreg() or member.isdir()}
    names: set[str] = set()
    for member in members:
        name = member.name
        normal = posixpath.normpath(name)
        if name != normal or name in (".", "..") or name.startswith(("/", "../")) or "\0" in name or name in names:
            raise ProjectError(f"the project archive holds the path {name!r}, which is not allowed in one")
        names.add(name)
        if not (member.isreg() or member.isdir() or member.issym()):
            raise ProjectError(f"the project archive holds {name!r}, which is neither a file, a folder nor a link")
        parents = name.split("/")[:-1]
        if any("/".join(parents[: count + 1]) not in solid for count in range(len(parents))):
            raise ProjectError(f"the project archive holds {name!r} outside of its folders")
        if member.issym():
            # Links lead straight to a file or folder of the archive, never over another link.
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), member.linkname))
            direct = posixpath.normpath(member.linkname) == member.linkname
            if member.linkname.startswith("/") or not direct or target not in solid:
                raise ProjectError(f"the project archive holds the link {name!r}, which leaves the project")


#: The whole project, uncompressed: more is refused.
SIZE_LIMIT = 32 * 1024 * 1024
#: From this size, or this number of files, on a warning is given.
SIZE_WARNING = 10 * 1024 * 1024
FILE_COUNT_WARNING = 1_000

_LARGEST = 10  # so many of the largest files are named
_DEEPEST_COPY = 32  # folders copied in the place of links may hold links themselves, even in circles
_BYTECODE = (".pyc", ".pyo", ".pyd")


@dataclass(frozen=True, slots=True)
class ProjectFile:
    """A file (or a link) in the archive."""

    name: str  # relative to the project, with ``/``
    size: int  # bytes; 0 for a link

    @property
    def shown(self) -> str:
        """The name, fit for a terminal."""
        return _shown(self.name)


@dataclass(frozen=True, slots=True)
class IgnoredEntry:
    """A file or folder that was left out; a folder stands for all that is in it."""

    name: str  # a folder's ends with ``/``
    reason: str

    @property
    def shown(self) -> str:
        """The name, fit for a terminal."""
        return _shown(self.name)


@dataclass(frozen=True, slots=True)
class Archive:
    """A packed project."""

    hash: str  # SHA-256 of the content, 64 hexadecimal digits
    data: bytes = field(repr=False)  # the gzipped tar file
    directory: str
    files: tuple[ProjectFile, ...] = field(repr=False)
    ignored: tuple[IgnoredEntry, ...] = field(repr=False)
    size: int  # of all files, uncompressed, in bytes
    warnings: tuple[str, ...] = ()

    @property
    def by_size(self) -> tuple[ProjectFile, ...]:
        """The files, the largest first."""
        return tuple(sorted(self.files, key=lambda file: (-file.size, file.name)))

    @property
    def largest(self) -> tuple[ProjectFile, ...]:
        """The ten largest files, the largest first."""
        return self.by_size[:_LARGEST]

    def listing(self) -> str:
        """Return what is packed, and what was left out and why, as text for a terminal.

        Contents are never shown, and of ``.env`` only that it is there.
        """
        count = f"{len(self.files):,} file{'' if len(self.files) == 1 else 's'}"
        lines = [f"project {self.directory}: {count}, {_size(self.size)} ({_size(len(self.data))} packed)"]
        lines += _table(self.largest)
        if len(self.files) > _LARGEST:
            lines.append(f"  and {len(self.files) - _LARGEST:,} smaller ones")
        if self.ignored:
            lines.append(f"left out: {len(self.ignored):,}")
            width = max(len(entry.shown) for entry in self.ignored)
            lines += [f"  {entry.shown:<{width}}  {entry.reason}" for entry in self.ignored]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])


def pack(directory: str | os.PathLike[str], config_file: str | os.PathLike[str] | None = None) -> Archive:
    """Pack a project directory.

    Left out are Python bytecode, hidden files and folders (except ``.env`` at the root), the API configuration file,
    and what ``.cortexignore`` at the root excludes. Links that stay inside the project are kept as links where their
    target is packed too, and as copies where it is not.

    Parameters
    ----------
    directory : path
        The project directory.
    config_file : path, optional
        The API configuration file, which the handler does not need; relative to the directory, or absolute.

    Raises
    ------
    ProjectError
        If the directory or a file in it cannot be read, a link leaves it or leads nowhere, ``.env`` has a malformed
        line, or the project is larger than 32 MiB.
    """
    from cortex_dask.project.ignore import (  # pathspec is not needed where projects are only unpacked
        IGNORE_FILE,
        IgnoreRules,
    )

    root = Path(directory).expanduser().resolve()
    if not root.is_dir():
        state = "is not a directory" if root.exists() else "does not exist"
        raise ProjectError(f"the project directory {root} {state}")
    read_dotenv(str(root))
    try:
        rules = IgnoreRules((root / IGNORE_FILE).read_bytes() if (root / IGNORE_FILE).is_file() else b"")
    except OSError as error:
        raise ProjectError(f"{root / IGNORE_FILE} cannot be read: {error.strerror}") from None
    walk = _Walk(root, rules, None if config_file is None else (root / config_file).resolve())
    walk.visit("", root)
    walk.settle_links()
    _check_size(root, walk.files)
    members, size = [], 0
    for name in sorted({*walk.folders, *walk.files, *walk.links}):
        member = tarfile.TarInfo(name)
        member.mode = 0o755
        content = b""
        if name in walk.links:
            member.type, member.linkname = tarfile.SYMTYPE, walk.links[name]
        elif name in walk.folders:
            member.type = tarfile.DIRTYPE
        else:
            content, member.mode = _read(walk.files[name][0])
            member.size = len(content)
        size += member.size
        members.append((member, content))
    stream = io.BytesIO()
    with tarfile.open(
        fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape"
    ) as tar:
        for member, content in members:
            tar.addfile(member, io.BytesIO(content))
    files = tuple(ProjectFile(member.name, member.size) for member, _ in members if not member.isdir())
    return Archive(
        hash=hashlib.sha256(stream.getbuffer()).hexdigest(),
        data=gzip.compress(stream.getbuffer(), compresslevel=6, mtime=0),
        directory=str(root),
        files=files,
        ignored=tuple(sorted(walk.ignored, key=lambda entry: entry.name)),
        size=size,
        warnings=tuple(_warnings(files, size, rules)),
    )


class _Walk:
    """Goes through a project directory and sorts what it finds."""

    def __init__(self, root: Path, rules: IgnoreRules, config_file: Path | None) -> None:
        self.root = root
        self.rules = rules
        self.config_file = config_file
        self.files: dict[str, tuple[Path, int]] = {}  # name -> where it is read from, size
        self.folders: set[str] = set()
        self.links: dict[str, str] = {}  # name -> target relative to the link's folder
        self.ignored: list[IgnoredEntry] = []
        self._found: list[tuple[str, Path]] = []  # links, decided on when all files are known

    def visit(self, prefix: str, folder: Path) -> None:
        """Take in the entries of one folder, whose names in the archive start with ``prefix``."""
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise ProjectError(f"the folder {folder} cannot be read: {error.strerror}") from None
        for entry in entries:
            name = prefix + entry.name
            is_folder = entry.is_dir(follow_symlinks=False)
            reason = self._reason(name, Path(entry.path), is_folder)
            if reason is not None:
                self.ignored.append(IgnoredEntry(f"{name}/" if is_folder else name, reason))
            elif entry.is_symlink():
                self._found.append((name, Path(entry.path)))
            elif is_folder:
                self.folders.add(name)
                self.visit(f"{name}/", Path(entry.path))
            elif entry.is_file(follow_symlinks=False):
                self.files[name] = (Path(entry.path), entry.stat(follow_symlinks=False).st_size)
            else:
                self.ignored.append(IgnoredEntry(name, "neither a file nor a folder"))

    def _reason(self, name: str, path: Path, is_folder: bool) -> str | None:
        """Return why an entry is left out, or None."""
        base = path.name
        if name == DOTENV_FILE and path.is_file():
            return None
        if base.startswith("."):
            return "hidden"
        if base == "__pycache__" or (base.endswith(_BYTECODE) and not is_folder):
            return "Python bytecode"
        if self.config_file is not None and path == self.config_file:
            return "the API configuration"
        pattern = self.rules.excluding(name, folder=is_folder)
        return None if pattern is None else str(pattern)

    def settle_links(self) -> None:
        """Decide for each link whether it travels as a link or as a copy of its target."""
        while self._found:
            name, path = self._found.pop(0)
            where = f"the link {name} in the project {self.root}"
            target = Path(os.path.realpath(path))
            shown = path.readlink()
            if not target.is_relative_to(self.root):
                raise ProjectError(
                    f"{where} leaves the project: it points to {shown}; "
                    "put a copy there instead, or list the link in .cortexignore"
                )
            if not target.exists():
                raise ProjectError(
                    f"{where} leads nowhere: it points to {shown}; remove it, or list it in .cortexignore"
                )
            relative = target.relative_to(self.root).as_posix()
            if relative in self.files or relative in self.folders or relative == ".":
                self.links[name] = os.path.relpath(relative, PurePosixPath(name).parent)
            elif target.is_file():
                self.files[name] = (target, target.stat().st_size)
            elif target.is_dir() and name.count("/") < _DEEPEST_COPY:
                self.folders.add(name)
                self.visit(f"{name}/", target)
            else:
                raise ProjectError(
                    f"{where} points to {shown}, which is left out of the project and cannot be copied; "
                    "list the link in .cortexignore"
                )


def _read(path: Path) -> tuple[bytes, int]:
    """Return a file's content and its normalised mode."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            return file.read(), 0o755 if mode & stat.S_IXUSR else 0o644
    except OSError as error:
        raise ProjectError(f"the project's file {path} cannot be read: {error.strerror}") from None


def _check_size(root: Path, files: dict[str, tuple[Path, int]]) -> None:
    total = sum(size for _, size in files.values())
    if total > SIZE_LIMIT:
        largest = sorted((ProjectFile(name, size) for name, (_, size) in files.items()), key=lambda file: -file.size)
        lines = "\n".join(_table(tuple(largest[:_LARGEST])))
        raise ProjectError(
            f"the project {root} has {_size(total)} in {len(files):,} files, and at most {_size(SIZE_LIMIT)} are "
            f"allowed; list what the handler does not need in .cortexignore. Its largest files:\n{lines}"
        )


def _warnings(files: tuple[ProjectFile, ...], size: int, rules: IgnoreRules) -> list[str]:
    warnings = [f"{pattern} is no pattern that can match, so it is skipped" for pattern in rules.unusable]
    hint = "every host fetches all of it; list what the handler does not need in .cortexignore"
    if size >= SIZE_WARNING:
        warnings.append(f"the project has {_size(size)} (at most {_size(SIZE_LIMIT)} are allowed); {hint}")
    if len(files) >= FILE_COUNT_WARNING:
        warnings.append(f"the project has {len(files):,} files; {hint}")
    return warnings


def _table(files: tuple[ProjectFile, ...]) -> list[str]:
    return [f"  {_size(file.size):>10}  {file.shown}" for file in files]


def _shown(name: str) -> str:
    """Return a name fit for a terminal: no control characters, no bytes that are not text."""
    text = os.fsencode(name).decode("utf-8", "replace")
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} MiB"
