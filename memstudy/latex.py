"""Text for LaTeX."""

from __future__ import annotations

import re

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def escape(text: str) -> str:
    """``text`` with what LaTeX would take for its own escaped."""
    return "".join(_LATEX.get(character, character) for character in text)


def breakable(text: str) -> str:
    """``text`` for LaTeX, to be broken after any underscore, plus sign or punctuation."""
    return re.sub(r"(\\_|[+,;:=/\-])(?! )", r"\1\\allowbreak{}", escape(text))
