"""What a page of docs/ shows: files with a caption, and console sessions with their output."""

import doctest
import re
import textwrap
from collections.abc import Callable
from pathlib import Path

SESSION = re.compile(r"^\.\. code-block:: console\n\n((?: {3}.*\n|\n)+)", re.MULTILINE)
FILE = re.compile(r"^\.\. code-block:: \w+\n   :caption: (\S+)\n\n((?: {3}.*\n|\n)+)", re.MULTILINE)
COMMAND = re.compile(r"^\$ ((?:.*\\\n)*.*)\n", re.MULTILINE)


def write_files(page: str, folder: Path) -> None:
    """Write the files that `page` shows."""
    for name, text in FILE.findall(page):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text).rstrip() + "\n", "utf-8")


def commands(page: str) -> list[tuple[str, str]]:
    """Return the commands that `page` shows, each with its output there."""
    shown = []
    for session in map(textwrap.dedent, SESSION.findall(page)):
        before, *rest = COMMAND.split(session)
        assert not before.strip(), before
        shown += [(rest[n].replace("\\\n", ""), rest[n + 1].strip("\n")) for n in range(0, len(rest), 2)]
    return shown


def assert_shown(page: str, run: Callable[[str], str]) -> None:
    """Assert that each command of `page` prints what the page shows; ``...`` stands for any text."""
    for command, want in commands(page):
        got = "\n".join(line.rstrip() for line in run(command).strip("\n").splitlines())
        same = doctest.OutputChecker().check_output(f"{want}\n", f"{got}\n", doctest.ELLIPSIS)
        assert same, f"$ {command}\n{got}\n--- the page shows:\n{want}"
