"""Bad input on the command line: one line that names the thing, the value and the remedy; exit status 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def one_line() -> Iterator[None]:
    """Turn a ``ValueError``, or a package that is not installed, into one line on stderr and exit status 2."""
    try:
        yield
    except ModuleNotFoundError as error:
        if not error.name or error.name.startswith("memstudy"):
            raise
        typer.echo(f"error: {error.name} is not installed: pip install 'memstudy[study]'", err=True)
        raise typer.Exit(2) from None
    except ValueError as error:
        from pydantic import ValidationError

        if isinstance(error, ValidationError):
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            said = f"{where}={first['input']!r}: " if where and first["type"] != "missing" else where and f"{where}: "
            line = said + first["msg"].removeprefix("Value error, ")
        else:
            line = " ".join(str(error).split())
        typer.echo(f"error: {line}", err=True)
        raise typer.Exit(2) from None
