"""The project's ``.env`` file: read with python-dotenv's parser, and never quoted."""

from __future__ import annotations

import io
import re
from pathlib import Path

from cortex_dask.errors import ProjectError

#: The name of the file at the project's root.
DOTENV_FILE = ".env"


def read_dotenv(directory: str) -> dict[str, str]:
    """Return the variables of a project's ``.env`` file; an empty dict where there is none.

    Values may be quoted, span lines in quotes, and refer to earlier variables or to the environment as ``${NAME}``.

    Parameters
    ----------
    directory : str
        The project directory.

    Raises
    ------
    ProjectError
        If a line is not ``VARIABLE=value``; the message has the file and the line's number, never what the line says.
    """
    file = Path(directory) / DOTENV_FILE
    if not file.is_file():
        return {}
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ProjectError(f"{file}:{line}: the line is not UTF-8 text; expected VARIABLE=value") from None
    except OSError as error:
        raise ProjectError(f"{file} cannot be read: {error.strerror}") from None
    # Imported here: of all handler processes, only those of projects with the file need it.
    from dotenv import dotenv_values
    from dotenv.parser import parse_stream

    for binding in parse_stream(io.StringIO(text)):
        if binding.key is None and not binding.error:
            continue  # a comment or an empty line
        # The parser counts from the empty lines that it hands over together with a statement.
        statement = binding.original.string
        skipped = statement[: len(statement) - len(statement.lstrip())]
        line = binding.original.line + len(re.findall(r"\r\n|\n|\r", skipped))
        if binding.error or binding.value is None:
            raise ProjectError(f"{file}:{line}: the line cannot be read; expected VARIABLE=value")
        if "\0" in binding.value or "\0" in (binding.key or ""):
            raise ProjectError(f"{file}:{line}: the line holds a null character; expected VARIABLE=value")
    values = dotenv_values(stream=io.StringIO(text), encoding="utf-8")
    return {key: value for key, value in values.items() if value is not None}
