"""An open JSON file as blocks of whole lines, or as the elements of an array, in bounded memory.

Compression is told by the first bytes of the file, not by its name: some stores decompress what they serve.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from bisect import bisect_right
from collections.abc import Iterator
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self, cast

from cortex_dask.io.batch import BadLine
from cortex_dask.io.store.source import UnreadableInput, local_path, open_source

LOCAL_BLOCK = 1 << 20  # bytes read at a time; ten times that as Python objects
_REMOTE_BLOCK = 4 << 20  # a request costs some tens of milliseconds
_LONGEST_LINE = 1 << 30
_BOM = b"\xef\xbb\xbf"
_SPACE = re.compile(r"[ \t\r\n]*")

_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}


class Block(NamedTuple):
    """Whole lines, the first at ``offset`` of the (decompressed) file; only the last of all may lack its newline."""

    offset: int
    data: bytes


def compression_of(head: bytes) -> str | None:
    """Return the compression of a file from its first bytes."""
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), None)


class JsonFile:
    """An open JSON file; ``data`` is its content, if it has been fetched already."""

    def __init__(self, path: str, size: int, tag: str, data: bytes | None = None) -> None:
        self._path, self._size, self._tag = path, size, tag
        self._block = LOCAL_BLOCK if local_path(path) is not None else _REMOTE_BLOCK
        self._raw: BinaryIO = open_source(path, size, tag) if data is None else io.BytesIO(data)
        try:
            self._detect_format()
        except BaseException:
            self._raw.close()
            raise

    def _detect_format(self) -> None:
        """Detect compression, encoding and kind from the first bytes."""
        head = self._raw.read(min(self._size, 4096))
        self._compression = compression_of(head)
        self.is_compressed = self._compression is not None  # then it is read from its start
        if self.is_compressed:
            stream = self._decompressed()
            head = stream.read(4096)
        if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise UnreadableInput(self._path, "is UTF-16: convert it to UTF-8")
        self._start = len(_BOM) if head.startswith(_BOM) else 0
        # Its first character decides.
        self.is_array = head[self._start :].lstrip(b" \t\r\n").startswith(b"[")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._raw.close()

    def _decompressed(self) -> BinaryIO:
        self._raw.seek(0)
        if self._compression == "gzip":
            import gzip

            return cast(BinaryIO, gzip.GzipFile(fileobj=io.BufferedReader(_KeepOpen(self._raw), 1 << 18)))
        if self._compression == "bz2":
            import bz2

            return cast(BinaryIO, bz2.BZ2File(io.BufferedReader(_KeepOpen(self._raw), 1 << 18)))
        import pyarrow as pa  # has zstd on every Python

        return cast(BinaryIO, pa.CompressedInputStream(pa.PythonFile(_KeepOpen(self._raw), mode="r"), "zstd"))

    # lines ------------------------------------------------------------------------------------------------------------

    def blocks(self, start: int, stop: int) -> Iterator[Block]:
        """Yield the lines that start in bytes ``start`` to ``stop``; of a compressed file always all lines."""
        if self.is_compressed:
            stream = self._decompressed()
            stream.read(self._start)
            yield from self._whole_lines(iter(lambda: stream.read(self._block), b""), self._start)
            return
        start = max(start, self._start)
        if start >= stop:
            return
        if start > self._start:  # the line that holds the byte before belongs to the piece before
            found = self._first_line(start - 1, stop)
            if found is None:
                return
            start = found
        self._raw.seek(start)
        yield from self._whole_lines(self._bytes(start, stop), start)

    def _first_line(self, at: int, stop: int) -> int | None:
        """Return where the first line after a newline at or after ``at`` starts, None if not before ``stop``."""
        self._raw.seek(at)
        while at < stop - 1:
            data = self._raw.read(min(64 << 10, stop - 1 - at))
            if not data:
                return None
            newline = data.find(b"\n")
            if newline >= 0:
                return at + newline + 1
            at += len(data)
        return None

    def _bytes(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield bytes ``start`` to ``stop``, and on to the end of the last line that starts before ``stop``."""
        at, last = start, b""
        while at < stop:
            data = self._raw.read(min(self._block, stop - at))
            if not data:
                return
            at, last = at + len(data), data
            yield data
        while not last.endswith(b"\n"):
            last = self._raw.read(64 << 10)
            if not last:
                return
            newline = last.find(b"\n")
            if newline >= 0:
                last = last[: newline + 1]
            yield last

    def _whole_lines(self, chunks: Iterator[bytes], offset: int) -> Iterator[Block]:
        """Cut chunks at their last newlines."""
        begun: list[bytes] = []  # of the line that is not whole yet; joined once, as lines may be long
        length = 0
        for chunk in chunks:
            cut = chunk.rfind(b"\n") + 1
            if cut:
                whole = chunk if cut == len(chunk) else memoryview(chunk)[:cut]  # copied once, here or below
                data = b"".join((*begun, whole)) if begun else bytes(whole)
                yield Block(offset, data)
                offset += len(data)
                begun, length = [], 0
            if cut < len(chunk):
                begun.append(chunk[cut:] if cut else chunk)
                length += len(begun[-1])
                if length > _LONGEST_LINE:
                    raise UnreadableInput(self._path, f"has a line of more than 1 GiB at byte {offset}")
        if begun:
            yield Block(offset, b"".join(begun))

    def lines_before(self, offset: int) -> int:
        """Count the newlines before a byte of a plain file, on from where they were counted before."""
        marks = _MARKS.setdefault((self._path, self._tag), [(0, 0)])
        while len(_MARKS) > 8:
            _MARKS.pop(next(iter(_MARKS)))
        place = bisect_right(marks, (offset, offset))
        at, count = marks[place - 1]
        here = self._raw.tell()
        self._raw.seek(at)
        while at < offset:
            data = self._raw.read(min(self._block, offset - at))
            if not data:
                break
            at, count = at + len(data), count + data.count(b"\n")
        self._raw.seek(here)
        if at > marks[place - 1][0]:
            marks.insert(place, (at, count))
        return count

    def sample(self, count: int) -> tuple[bytes, float, bool]:
        """Return the first bytes (decompressed), how many of the file's they are made of, and whether they are all."""
        stream = self._decompressed() if self.is_compressed else self._raw
        if not self.is_compressed:
            stream.seek(0)
        parts = []
        while count > 0 and (data := stream.read(count)):
            parts.append(data)
            count -= len(data)
        whole = not stream.read(1)
        sample = b"".join(parts)
        consumed = self._size if whole else self._raw.tell() if self.is_compressed else len(sample)
        return sample[self._start :], consumed, whole

    # arrays -----------------------------------------------------------------------------------------------------------

    def elements(self, path: str) -> Iterator[tuple[Any, ...] | BadLine]:
        """Yield the objects of an array, as lists with unit, starts and stops, and elements that are no objects."""
        self._raw.seek(0)
        stream = self._decompressed() if self.is_compressed else self._raw
        yield from _Array(stream, path, self._block).elements()


#: Lines before some bytes of files in which malformed lines were found: (byte, newlines before it).
_MARKS: dict[tuple[str, str], list[tuple[int, int]]] = {}


class _KeepOpen(io.RawIOBase):
    """A file whose wrappers do not close it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Array:
    """The elements of a JSON array, parsed one after the other from a window of text."""

    def __init__(self, stream: BinaryIO, path: str, block: int) -> None:
        self._stream, self._path, self._block = stream, path, block
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._parse = json.JSONDecoder().raw_decode
        self._text, self._at, self._ended = "", 0, False
        self._dropped = 0  # characters before the window
        self._lines = 0  # newlines before the window

    def elements(self) -> Iterator[tuple[Any, ...] | BadLine]:
        if self._peek() != "[":
            raise self._malformed("it does not start with '['", 0)
        self._at += 1
        values: list[Any] = []
        first = number = 0
        closed = self._peek() == "]"
        self._at += closed
        while not closed:
            start = self._dropped + self._at
            value, text, line = self._element(number)
            if isinstance(value, dict):
                values.append(value)
            else:
                if values:
                    yield self._found(values, first)
                values, first = [], number + 1
                yield BadLine(self._path, line, start, text(), f"element {number + 1} of the array is not an object")
            number += 1
            following = self._peek()
            if following not in (",", "]"):
                raise self._malformed("',' or ']' expected", number)
            self._at += 1
            closed = following == "]"
            if not closed and self._peek() == "]":
                raise self._malformed("another element expected after ','", number)
            if len(values) == 1024:
                yield self._found(values, first)
                values, first = [], number
        if values:
            yield self._found(values, first)
        if self._peek():
            raise self._malformed("more text after the array", number)

    def _found(self, values: list[Any], first: int) -> tuple[Any, ...]:
        stop = first + len(values)
        return values, self._path, "rows", range(first, stop), range(first + 1, stop + 1)

    def _peek(self) -> str:
        """Move to the next character that is not white space, and return it; empty at the end."""
        while True:
            found = _SPACE.match(self._text, self._at)
            assert found is not None
            self._at = found.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def _element(self, number: int) -> tuple[Any, Any, int]:
        self._peek()
        while True:
            try:
                value, end = self._parse(self._text, self._at)
            except RecursionError:
                raise self._malformed("nested too deeply", number) from None
            except ValueError as error:
                message, position = getattr(error, "msg", str(error)), getattr(error, "pos", self._at)
                place = self._dropped + position
                # What is cut off at the end of the window fails there, within the length of the longest literal.
                incomplete = position > len(self._text) - 16 or message.startswith("Unterminated string")
                if not incomplete or not self._more():
                    raise self._malformed(message, number, place) from None
                continue
            # A number may continue after the window; then no more than "e+" is left over.
            number_cut = not isinstance(value, (dict, list, str)) and len(self._text) - end <= 2
            if not number_cut or self._text[end : end + 1] in tuple(",] \t\r\n") or not self._more():
                break
        start, line = (
            self._at,
            self._lines + self._text.count("\n", 0, self._at) + 1 if not isinstance(value, dict) else 0,
        )
        self._at = end
        return value, lambda: self._text[start:end][: 64 << 10], line

    def _more(self) -> bool:
        """Read on; drop what has been parsed."""
        if self._ended:
            return False
        if len(self._text) - self._at > _LONGEST_LINE:
            raise UnreadableInput(self._path, "has an element of more than 1 GiB in its array")
        data = self._stream.read(max(self._block, len(self._text) - self._at))
        try:
            text = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise UnreadableInput(self._path, f"is not UTF-8: {error.reason} after character {self._dropped}") from None
        self._ended = not data
        self._lines += self._text.count("\n", 0, self._at)
        self._dropped += self._at
        self._text, self._at = self._text[self._at :] + text, 0
        return bool(text) or not self._ended

    def _malformed(self, problem: str, number: int, at: int | None = None) -> UnreadableInput:
        """Return the error; ``at`` is the character of the file where it is, None for the current one."""
        at = self._at if at is None else at - self._dropped
        line = self._lines + self._text.count("\n", 0, at) + 1
        return UnreadableInput(
            self._path,
            f"is not a JSON array: {problem} at element {number + 1}, line {line}, character {self._dropped + at + 1}",
        )
