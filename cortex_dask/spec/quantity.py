"""Quantities as Kubernetes writes them: ``200m``, ``1.5``, ``512Mi``, ``2G``, ``1e3``."""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal, localcontext

#: What a quantity may look like, in the words of an error message.
ALLOWED = "a quantity as Kubernetes writes it, such as 2, 0.5, 200m, 1e3, 512Mi or 2G"

_DECIMAL = {"n": -9, "u": -6, "m": -3, "": 0, "k": 3, "K": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}
_DIGITS = 120  # more than 40 digits before and after the point, times 2 ** 60, can have
_BINARY = {"Ki": 10, "Mi": 20, "Gi": 30, "Ti": 40, "Pi": 50, "Ei": 60}
# An exponent is tried before the suffix E, so 1E3 is a thousand and 1E an exa. Two digits of exponent reach far beyond
# any machine, and keep a typing error from becoming a number with a billion digits.
_FORM = re.compile(
    r"(?P<number>[+-]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40}))"
    r"(?:[eE](?P<exponent>[+-]?[0-9]{1,2})|(?P<suffix>[KMGTPE]i|[numkKMGTPE]))?"
)


def parse_quantity(value: object) -> Decimal:
    """Return the exact value of a quantity.

    Parameters
    ----------
    value : str, int or float
        Text with a suffix ``n u m k K M G T P E`` (powers of ten), ``Ki Mi Gi Ti Pi Ei`` (powers of two) or an
        exponent; or a number.

    Raises
    ------
    ValueError
        If it is none of these; the message says what is allowed.

    Examples
    --------
    >>> parse_quantity("200m"), parse_quantity("1Ki"), parse_quantity(0.5)
    (Decimal('0.200'), Decimal('1024'), Decimal('0.5'))

    The forms are those of Kubernetes' ``resource.Quantity`` and, in addition, ``K``, which Cortex takes for ``k``.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        raise ValueError(f"found {value!r}; allowed is {ALLOWED}")
    # repr() of a float is the shortest text that reads back as the same number: 0.1 stays exactly 0.1.
    match = _FORM.fullmatch(value.strip() if isinstance(value, str) else str(value))
    if match is None:
        raise ValueError(f"found {value!r}; allowed is {ALLOWED}")
    number, suffix = match["number"], match["suffix"] or ""
    if suffix in _BINARY:
        with localcontext(prec=_DIGITS):
            return Decimal(number) * (1 << _BINARY[suffix])
    # Made from text, because that is exact, whatever the precision of the caller's decimal context.
    return Decimal(f"{number}e{match['exponent'] or _DECIMAL[suffix]}")


def parse_bytes(value: object) -> int:
    """Return a quantity of memory in bytes; a fraction of a byte counts as one.

    Raises
    ------
    ValueError
        If it is no quantity, or less than one byte.

    Examples
    --------
    >>> parse_bytes("1.5Gi")
    1610612736
    """
    count = int(parse_quantity(value).to_integral_value(ROUND_CEILING))
    if count < 1:
        raise ValueError(f"found {value!r}; at least one byte is needed, such as 512Mi or 2G")
    return count
