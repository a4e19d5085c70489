"""The project directory: what is packed, what is left out, and how it comes out again on another host."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import socket
import stat
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cortex_dask.errors import ProjectError
from cortex_dask.io import cache
from cortex_dask.project import archive as project_archive
from cortex_dask.project.archive import pack, unpack
from cortex_dask.project.dotenv import read_dotenv
from cortex_dask.project.ignore import IgnoreRules


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def names(archive: project_archive.Archive) -> list[str]:
    return [file.name for file in archive.files]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "my-project", {"cortex.yaml": "", "handler.py": "class Handler: ...\n"})


# what is packed -----------------------------------------------------------------------------------------------------


def test_leaves_out_what_the_contract_names(folder: Path) -> None:
    kept = ["handler.py", "values.json", "pkg/mod.py", "sub/cortex.yaml", "data.pyc.txt", "sub/env"]
    left = ["a.pyc", "pkg/b.pyo", "pkg/c.pyd", "__pycache__/x.txt", "pkg/__pycache__/y.pyc", ".hidden", ".git/config"]
    write(folder, dict.fromkeys([*kept, *left, ".env", "sub/.env", "sub/.cortexignore"], "A=1"))
    archive = pack(folder, "cortex.yaml")
    assert names(archive) == sorted([*kept, ".env"])
    reasons = {entry.name: entry.reason for entry in archive.ignored}
    assert reasons["cortex.yaml"] == "the API configuration"
    assert reasons["a.pyc"] == reasons["__pycache__/"] == "Python bytecode"
    assert reasons[".git/"] == reasons["sub/.env"] == "hidden"


def test_dotenv_is_taken_along_even_if_it_is_listed(folder: Path) -> None:
    write(folder, {".env": "A=1", ".cortexignore": ".env\n*\n!handler.py\n"})
    assert names(pack(folder, "cortex.yaml")) == [".env", "handler.py"]


def test_a_folder_called_dotenv_is_hidden(folder: Path, tmp_path: Path) -> None:
    write(folder, {".env/bin/python": ""})
    assert names(pack(folder)) == ["cortex.yaml", "handler.py"]


def test_listing_says_what_and_why_and_shows_no_content(folder: Path) -> None:
    write(
        folder, {".env": "PASSWORD=hunter2", "big.bin": b"x" * 5000, "notes.txt": "n", ".cortexignore": "# c\n*.txt\n"}
    )
    archive = pack(folder, "cortex.yaml")
    text = archive.listing()
    assert "3 files, 4.9 KiB" in text
    assert text.index("big.bin") < text.index("handler.py")
    assert "notes.txt      .cortexignore:2: *.txt" in text
    assert "hunter2" not in text + repr(archive)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(ProjectError, match=r"nowhere does not exist"):
        pack(tmp_path / "nowhere")
    write(tmp_path, {"file": ""})
    with pytest.raises(ProjectError, match=r"file is not a directory"):
        pack(tmp_path / "file")


def test_too_large_names_the_largest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        with (folder / f"model-{number:02}.bin").open("wb") as file:
            file.truncate(3 * 2**20 + number)  # sparse: nothing is written
    with pytest.raises(ProjectError) as caught:
        pack(folder)
    message = str(caught.value)
    assert "has 36.0 MiB in 14 files, and at most 32.0 MiB are allowed" in message
    assert ".cortexignore" in message
    assert message.count("model-") == 10
    assert message.index("model-11.bin") < message.index("model-10.bin")
    write(folder, {".cortexignore": "*.bin"})
    assert names(pack(folder)) == ["cortex.yaml", "handler.py"]


def test_warns_from_ten_mebibytes_and_a_thousand_files(folder: Path) -> None:
    assert pack(folder).warnings == ()
    for number in range(998):
        (folder / f"{number}.txt").touch()
    (warning,) = pack(folder).warnings
    assert "1,000 files" in warning
    with (folder / "0.txt").open("wb") as file:
        file.truncate(10 * 2**20)
    assert "10.0 MiB" in pack(folder).warnings[0]


def test_an_unusable_pattern_is_named(folder: Path) -> None:
    write(folder, {".cortexignore": "ok\n[z-a]\n"})
    assert pack(folder).warnings == (".cortexignore:2: [z-a] is no pattern that can match, so it is skipped",)


def test_sockets_and_pipes_are_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(folder / "pipe")
    monkeypatch.chdir(folder)  # a socket's path must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        archive = pack(folder)
    assert {entry.name for entry in archive.ignored} == {"pipe", "socket"}


# .cortexignore is .gitignore ----------------------------------------------------------------------------------------

TREE = """
a.txt b.txt c.log top/a.txt top/b/c.txt top/b/d.log top/keep/me.txt build/out.o build/sub/x.txt src/build src/main.py
src/deep/er/main.py doc/index.md doc/api/a.md "with space.txt" "trailing " #hash !bang [brackets] star*name back\\slash
é.txt dir/é/x.txt foo foobar dir/foo/bar dir/foo/baz/qux logs/1.log logs/keep.log logs/old/2.log a/b/c/d/e.txt x1 x2 xa
""".strip()

RULES = {
    "empty": "",
    "comments and blank lines": "# a comment\n\n   \n*.log\n",
    "a name at any depth": "foo",
    "anchored": "/foo\n/main.py",
    "anchored by a slash inside": "top/b\nb/c.txt",
    "folders only": "build/\nfoo/",
    "negation": "*.log\n!keep.log",
    "the last match wins": "*.txt\n!a.txt\na.txt",
    "a file in an excluded folder stays excluded": "logs/\n!logs/keep.log",
    "a file in a folder whose content is excluded": "logs/*\n!logs/keep.log",
    "a folder is re-included": "top/*\n!top/keep/",
    "nested re-inclusion": "/dir/*\n!/dir/foo\n/dir/foo/*\n!/dir/foo/baz",
    "everything but": "*\n!*/\n!*.py",
    "all but one folder": "/*\n!/src",
    "leading double star": "**/main.py\n**/b",
    "trailing double star": "top/**\n!top/keep",
    "inner double star": "a/**/e.txt\nsrc/**/main.py",
    "double star and slash": "a/**/",
    "stars inside a name": "fo**bar\n*.t*t",
    "three stars": "/***\n!f*",
    "question marks": "x?\n?.txt",
    "a question mark is a byte": "dir/?\n??.txt",
    "sets": "x[0-9]\n[ab].txt",
    "negated sets": "x[!0-9]\nx[^a]",
    "named sets": "x[[:digit:]]\n[[:upper:]]*",
    "a set with a bracket": "[[]brackets]",
    "a reversed range": "[z-a]\nfoo",
    "escaped first characters": "\\#hash\n\\!bang",
    "escaped star": "star\\*name",
    "escaped backslash": "back\\\\slash",
    "escaped letters": "f\\oo",
    "trailing spaces go": "foo   ",
    "an escaped trailing space stays": "trailing\\ ",
    "a space inside": "with space.txt",
    "carriage returns": "foo\r\n*.log\r\n",
    "byte order mark": "\ufefffoo",
    "only slashes": "/\n!/\n//",
    "a lone exclamation mark": "*.txt\n!",
    "non-ASCII": "é.txt\ndir/é",
    "an escaped slash": "top\\/b",
}


def paths() -> list[str]:
    import shlex

    return [name.replace("\\\\", "\\") for name in shlex.split(TREE.replace("\\", "\\\\\\\\"))]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("repository")
    write(root, dict.fromkeys(paths(), ""))
    subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    return root


def ignored_by_git(root: Path, rules: str) -> set[str]:
    (root / ".git" / "info" / "exclude").write_bytes(rules.encode())
    entries = [str(path.relative_to(root)) for path in root.rglob("*") if ".git" not in path.parts]
    command = ["git", "-C", str(root), "-c", "core.ignorecase=false", "check-ignore", "--no-index", "-z", "--stdin"]
    answer = subprocess.run(command, input="\0".join(entries).encode(), capture_output=True, timeout=60)
    assert answer.returncode in (0, 1), answer.stderr
    return set(answer.stdout.decode().split("\0")) - {""}


def ignored_here(root: Path, rules: str) -> set[str]:
    matcher = IgnoreRules(rules.encode())
    found: set[str] = set()

    def visit(folder: Path, excluded: bool) -> None:
        for path in folder.iterdir():
            if path.name == ".git":
                continue
            name = str(path.relative_to(root))
            inside = excluded or matcher.excluding(name, folder=path.is_dir()) is not None
            if inside:
                found.add(name)
            if path.is_dir():
                visit(path, inside)

    visit(root, False)
    return found


@pytest.mark.parametrize("rules", RULES.values(), ids=RULES.keys())
def test_patterns_as_git_has_them(repository: Path, rules: str) -> None:
    assert ignored_here(repository, rules) == ignored_by_git(repository, rules)


def test_the_table_of_patterns_excludes_something(repository: Path) -> None:
    """Guards the test above: with a broken call of git both sides might be empty."""
    assert len(ignored_by_git(repository, "*.txt")) >= 5
    assert {"trailing ", "star*name", "back\\slash", "é.txt"} <= set(paths())


# links --------------------------------------------------------------------------------------------------------------


def test_links_inside_the_project(folder: Path, tmp_path: Path) -> None:
    write(folder, {"real/values.json": "[1]", "secret/hidden.txt": "copied", ".cortexignore": "secret/"})
    (folder / "direct").symlink_to("real")
    (folder / "real" / "up.py").symlink_to("../handler.py")
    (folder / "absolute.json").symlink_to(folder / "real" / "values.json")
    (folder / "chain").symlink_to("direct/values.json")
    (folder / "copy").symlink_to("secret")
    (folder / "self").symlink_to(".")
    archive = pack(folder, "cortex.yaml")
    place = Path(unpack(archive.data, archive.hash, str(tmp_path / "cache")))
    for name in ("direct/values.json", "absolute.json", "chain", "self/self/chain"):
        assert (place / name).read_text() == "[1]"
    assert (place / "real" / "up.py").read_text() == "class Handler: ...\n"
    assert (place / "copy" / "hidden.txt").read_text() == "copied"
    assert not (place / "secret").exists()
    assert os.readlink(place / "absolute.json") == "real/values.json"


def test_links_that_leave_are_refused_with_the_path(folder: Path, tmp_path: Path) -> None:
    write(tmp_path, {"outside.txt": "private"})
    (folder / "sub").mkdir()
    (folder / "sub" / "link").symlink_to("../../outside.txt")
    with pytest.raises(ProjectError, match=r"the link sub/link in the project .* leaves the project") as caught:
        pack(folder)
    assert "../../outside.txt" in str(caught.value)
    write(folder, {".cortexignore": "link"})
    assert "sub/link" not in names(pack(folder))


def test_links_that_lead_nowhere_are_refused(folder: Path) -> None:
    (folder / "link").symlink_to("gone")
    with pytest.raises(ProjectError, match="leads nowhere: it points to gone"):
        pack(folder)


def test_copied_folders_that_link_to_each_other_end(folder: Path) -> None:
    write(folder, {"x/file": "", "y/file": "", ".cortexignore": "/x\n/y"})
    (folder / "x" / "to-y").symlink_to("../y")
    (folder / "y" / "to-x").symlink_to("../x")
    (folder / "start").symlink_to("x")
    with pytest.raises(ProjectError, match="left out of the project and cannot be copied"):
        pack(folder)


# the archive --------------------------------------------------------------------------------------------------------


def test_hash_depends_on_content_alone(folder: Path, tmp_path: Path) -> None:
    write(folder, {"b.txt": "b", "a.txt": "a", "sub/c.txt": "c"})
    first = pack(folder, "cortex.yaml")
    other = write(tmp_path / "elsewhere", {"sub/c.txt": "c", "a.txt": "a", "b.txt": "b"})
    write(other, {"handler.py": "class Handler: ...\n"})
    for path in other.rglob("*"):
        os.utime(path, (1, 1))
    (other / "a.txt").chmod(0o600)
    assert pack(other).hash == first.hash
    (other / "a.txt").chmod(0o700)
    executable = pack(other).hash
    write(other, {"a.txt": "A"})
    changed = pack(other).hash
    assert len({first.hash, executable, changed}) == 3


def test_round_trip(folder: Path, tmp_path: Path) -> None:
    write(folder, {"run.sh": "#!/bin/sh\n", ".env": "A=1\n", "ünï/ç é.txt": "x", "empty/.gitkeep": ""})
    (folder / "run.sh").chmod(0o755)
    archive = pack(folder, "cortex.yaml")
    place = Path(unpack(archive.data, archive.hash, str(tmp_path / "cache")))
    assert place == tmp_path / "cache" / "projects" / archive.hash
    assert {str(path.relative_to(place)) for path in place.rglob("*")} == {
        ".env", "handler.py", "run.sh", "empty", "ünï", "ünï/ç é.txt",
    }  # fmt: skip
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert stat.S_IMODE((place / ".env").stat().st_mode) == 0o600
    assert os.access(place / "run.sh", os.X_OK)
    assert not os.access(place / "handler.py", os.X_OK)


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are always text there")
def test_file_names_that_are_no_text(folder: Path, tmp_path: Path) -> None:
    with open(os.fsencode(folder) + b"/\xff.bin", "wb") as file:
        file.write(b"x")
    archive = pack(folder)
    place = unpack(archive.data, archive.hash, str(tmp_path / "cache"))
    assert b"\xff.bin" in os.listdir(os.fsencode(place))
    assert "\N{REPLACEMENT CHARACTER}.bin" in archive.listing()


def test_unpacked_once(folder: Path, tmp_path: Path) -> None:
    archive = pack(folder)
    fetched: list[int] = []

    def fetch() -> bytes:
        fetched.append(1)
        return archive.data

    with ThreadPoolExecutor(8) as pool:
        places = set(pool.map(lambda _: unpack(fetch, archive.hash, str(tmp_path / "cache")), range(16)))
    assert len(places) == 1
    assert len(fetched) == 1


def test_unpacked_by_several_processes_at_once(folder: Path, tmp_path: Path) -> None:
    archive = pack(folder)
    (tmp_path / "archive").write_bytes(archive.data)
    code = (
        "import sys, pathlib; from cortex_dask.project.archive import unpack; p, h, c = sys.argv[1:]\n"
        "def fetch():\n"
        "    print('fetched'); return pathlib.Path(p).read_bytes()\n"
        "place = pathlib.Path(unpack(fetch, h, c)); assert (place / 'handler.py').read_text()\n"
        "heavy = {'dask', 'pydantic', 'pathspec', 'yaml'} & set(sys.modules); assert not heavy, heavy"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "archive"), archive.hash, str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(4)]
    output = b"".join(process.communicate(timeout=60)[0] for process in processes)
    assert [process.returncode for process in processes] == [0] * 4
    assert output.count(b"fetched") == 1


def test_what_a_killed_process_left_is_replaced(folder: Path, tmp_path: Path) -> None:
    archive = pack(folder)
    projects = tmp_path / "cache" / "projects"
    left = write(projects / f".{archive.hash}.abc", {"half": ""})
    place = unpack(archive.data, archive.hash, str(tmp_path / "cache"))
    assert not left.exists()
    assert os.listdir(place)
    assert not list(projects.glob(".*"))


def test_damaged_archives(folder: Path, tmp_path: Path) -> None:
    archive = pack(folder)
    root = str(tmp_path / "cache")
    other = hashlib.sha256(b"other").hexdigest()
    for data, content_hash in ((archive.data, other), (archive.data[:-20], archive.hash), (b"junk", archive.hash)):
        with pytest.raises(ProjectError, match=f"the project archive {content_hash} is damaged"):
            unpack(data, content_hash, root)
    with pytest.raises(ProjectError, match="is no project hash"):
        unpack(archive.data, "../../etc", root)
    assert not [path for path in (tmp_path / "cache" / "projects").iterdir() if path.is_dir()]


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


FOLDER = member("sub", tarfile.DIRTYPE)


@pytest.mark.parametrize(
    "members",
    [
        [member("/etc/evil")],
        [member("../evil")],
        [FOLDER, member("sub/../../evil")],
        [member("./evil")],
        [member("nowhere/evil")],
        [member("twice"), member("twice")],
        [member("link", tarfile.SYMTYPE, "/etc/passwd")],
        [member("link", tarfile.SYMTYPE, "../evil")],
        [member("link", tarfile.SYMTYPE, "gone")],
        [FOLDER, member("sub/a", tarfile.SYMTYPE, ".."), member("b", tarfile.SYMTYPE, "sub/a/..")],
        [FOLDER, member("link", tarfile.SYMTYPE, "sub"), member("link/evil")],
        [member("hard", tarfile.LNKTYPE, "/etc/passwd")],
        [member("device", tarfile.CHRTYPE)],
        [member("pipe", tarfile.FIFOTYPE)],
    ],
    ids=lambda members: members[-1].name,
)
def test_forged_archives_are_refused(tmp_path: Path, members: list[tarfile.TarInfo]) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for info in members:
            archive.addfile(info)
    content_hash = hashlib.sha256(stream.getvalue()).hexdigest()
    with pytest.raises(ProjectError, match="the project archive holds"):
        unpack(gzip.compress(stream.getvalue()), content_hash, str(tmp_path / "cache" / "deep"))
    assert not list(tmp_path.rglob("*evil*"))


def test_prune_removes_what_nobody_uses(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    archive = pack(folder)
    (tmp_path / "archive").write_bytes(archive.data)
    hold = (
        "import sys, pathlib; from cortex_dask.project.archive import unpack\n"
        "unpack(pathlib.Path(sys.argv[1]).read_bytes(), *sys.argv[2:]); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "archive"), archive.hash, str(root)]
    mark = root / "projects" / f"{archive.hash}.used"
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        long_ago = time.time() - 30 * 86_400
        os.utime(mark, (long_ago, long_ago))
        assert cache.prune(str(root)) == []  # a process uses it
        process.communicate(timeout=60)
    assert cache.prune(str(root), unused_days=60) == []
    assert cache.prune(str(root)) == [archive.hash]
    assert not (root / "projects" / archive.hash).exists()
    assert (Path(unpack(archive.data, archive.hash, str(root))) / "handler.py").exists()


# the cache folder ---------------------------------------------------------------------------------------------------


def test_cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DASK_CORTEX_DASK__CACHE", "XDG_CACHE_HOME", "DASK_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DASK_ROOT_CONFIG", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_root() == str(
        tmp_path / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "cortex-dask"
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == str(tmp_path / "xdg" / "cortex-dask")
    write(tmp_path / ".config" / "dask", {"a.yaml": "cortex_dask: {cache: ~/first}", "b.yaml": "other: {cache: x}"})
    assert cache.cache_root() == str(tmp_path / "first")
    write(tmp_path / "mine", {"c.yaml": "cortex-dask:\n  cache: ~/second\n"})
    monkeypatch.setenv("DASK_CONFIG", str(tmp_path / "mine"))
    assert cache.cache_root() == str(tmp_path / "second")
    monkeypatch.setenv("DASK_CORTEX_DASK__CACHE", str(tmp_path / "third"))
    assert cache.cache_root() == str(tmp_path / "third")


def test_a_place_that_cannot_be_looked_at_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DASK_CORTEX_DASK__CACHE", raising=False)
    monkeypatch.setenv("DASK_ROOT_CONFIG", f"/{'x' * 5000}")  # a name that no file system takes
    monkeypatch.setenv("DASK_CONFIG", str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("cortex-dask: {cache: /data/cache}")
    assert cache.cache_root() == "/data/cache"


# .env ---------------------------------------------------------------------------------------------------------------


def test_dotenv(tmp_path: Path) -> None:
    assert read_dotenv(str(tmp_path)) == {}
    write(
        tmp_path, {".env": "\ufeff# comment\nA=1\n\nexport B='two words'\nC=\"x\\ny\"\nD=\nE=a=b # note\nF=${A}-${D}\n"}
    )
    assert read_dotenv(str(tmp_path)) == {"A": "1", "B": "two words", "C": "x\ny", "D": "", "E": "a=b", "F": "1-"}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("A=1\n\n# c\n\nTOKEN hunter2\n", 5),
        ("TOKEN: hunter2", 1),
        ("A=1\n=hunter2\n", 2),
        ("A=1\nhunter2\nB=2\n", 2),
        ("A=1\n\n\nB='hunter2\nC=1\n", 4),
        ("A=1\nB=hunter2\0\n", 2),
    ],
)
def test_malformed_dotenv_names_file_and_line_but_no_value(folder: Path, text: str, line: int) -> None:
    write(folder, {".env": text})
    for call in (read_dotenv, pack):
        with pytest.raises(ProjectError) as caught:
            call(str(folder))  # type: ignore[operator]
        assert f".env:{line}: " in str(caught.value)
        assert "expected VARIABLE=value" in str(caught.value)
        assert "hunter2" not in str(caught.value)


def test_dotenv_that_is_no_text(tmp_path: Path) -> None:
    write(tmp_path, {".env": b"A=1\nB=\xff\n"})
    with pytest.raises(ProjectError, match=r"\.env:2: the line is not UTF-8 text"):
        read_dotenv(str(tmp_path))
