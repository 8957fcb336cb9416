"""Calls of the command line in this process."""

from typer.testing import CliRunner

from memstudy.cli.main import app


def invoke(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_line(result, *words: str) -> None:
    """Assert that `result` is a refusal in one line on stderr that contains all `words`."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in line
    for word in words:
        assert word in line, line
