"""Long integers are found wherever they lie in a text, however large it is."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex_dask.io.json.reader import may_hold_long_integers

LONG = re.compile(rb"[0-9]{20}|-[0-9]{19}")
PIECES = st.lists(
    st.integers(1, 40).map(lambda count: b"8" * count) | st.sampled_from([b"-", b" ", b"/", b":", b"\xff", b'{"a": ']),
    max_size=30,
)


@settings(max_examples=300)
@given(pieces=PIECES, before=st.integers(0, 7), behind=st.sampled_from([0, 1, 2, 3, 20_000]))
def test_it_is_told_exactly(pieces: list[bytes], before: int, behind: int) -> None:
    text = b" " * before + b"".join(pieces) + b" " * behind
    assert may_hold_long_integers(text) == bool(LONG.search(text))


@pytest.mark.parametrize("size", [100, 16 * 1024, 16 * 1024 + 3, 1 << 20])
@pytest.mark.parametrize("end", range(8))
@pytest.mark.parametrize("number", [b"12345678901234567890", b"-1234567890123456789"])
def test_a_number_at_the_end_is_found(size: int, end: int, number: bytes) -> None:
    filler = b'{"a": 1234567890123456789}\n'  # 19 digits, which 64 bits can hold
    text = (filler * (size // len(filler) + 1))[: size - len(number) - end]
    text = text[: text.rfind(b"\n") + 1].ljust(size - len(number) - end)
    assert not may_hold_long_integers(text + b" " * (len(number) + end))
    assert may_hold_long_integers(text + number + b" " * end)
