"""Text, numbers and tables for LaTeX."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pandas as pd

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip
# Number formats by unit; the unit is in brackets in a table's header, or at the end of a value's name.
_BY_UNIT = {
    "MiB": ",.0f", "MB": ",.0f", "GiB": ",.2f", "GB": ",.1f", "ms": ",.0f", "s": ",.1f", "tokens/s": ",.0f",
    "%": ",.0f", "×": ",.2f",
}  # fmt: skip
MISSING = "–"


def escape(text: str) -> str:
    """``text`` with LaTeX's special characters escaped."""
    return "".join(_LATEX.get(character, character) for character in text)


def breakable(text: str) -> str:
    """``text`` for LaTeX, with line breaks allowed after any underscore, plus sign or punctuation."""
    return re.sub(r"(\\_|[+,;:=/\-])(?! )", r"\1\\allowbreak{}", escape(text))


def key(header: object) -> str:
    """``header`` as the name of a value: ``("measured", "peak [MiB]")`` gives ``measured_peak_mib``."""
    text = "_".join(map(str, header)) if isinstance(header, tuple) else str(header)
    text = text.replace("×", "x").replace("%", "percent").lower()
    return re.sub(r"[^0-9a-z]+", "_", text).strip("_")


def printed(name: str, value: object) -> str:
    """``value`` as text for the report; the unit at the end of ``name`` sets a number's digits.

    Raises
    ------
    ValueError
        For a fraction without a unit in ``name``.
    """
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return MISSING
    by_unit = {f"_{key(unit)}": spec for unit, spec in _BY_UNIT.items()}
    spec = next((spec for unit, spec in by_unit.items() if f"_{name}".endswith(unit)), None)
    if spec is None and value != round(value):
        raise ValueError(f"value {name}={value!r}: end its name with a unit ({', '.join(by_unit)}), or give a text")
    return format(value, spec or ",.0f")


def formats(frame: pd.DataFrame, digits: int | str | Mapping | None = None) -> dict[object, str]:
    """Format of each numeric column of ``frame``: by ``digits``, or by the unit in brackets in the column's header.

    Parameters
    ----------
    digits : int, str or mapping
        Digits after the point, or a format such as ``+.3f``; for all columns, or by column or its lowest header.

    Raises
    ------
    ValueError
        For a column of fractions without a unit and without ``digits``.
    """
    return {
        column: "{:" + _spec(column, values, digits) + "}"
        for column, values in frame.items()
        if pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values)
    }


def _spec(column: object, values: pd.Series, digits: int | str | Mapping | None) -> str:
    headers = column if isinstance(column, tuple) else (column,)
    if isinstance(digits, Mapping):
        digits = digits.get(column, digits.get(headers[-1]))
    if isinstance(digits, str):
        return digits
    if digits is not None:
        return f",.{digits}f"
    units = [unit for header in reversed(headers) for unit in re.findall(r"\[(.+?)\]", str(header)) if unit in _BY_UNIT]
    if units:
        return _BY_UNIT[units[0]]
    numbers = values.dropna()
    if (numbers != numbers.round()).any():
        raise ValueError(f"column {column!r} has fractions: give it a unit ({', '.join(_BY_UNIT)}) or digits")
    return ",.0f"


def cells(frame: pd.DataFrame, formats: Mapping[object, str]) -> dict[str, str]:
    """The text of each cell of ``frame`` in its table, by ``row.column``.

    Raises
    ------
    ValueError
        If two cells get the same name.
    """
    texts: dict[str, str] = {}
    for column, values in frame.items():
        for row, value in values.items():
            name = f"{key(row)}.{key(column)}"
            if name in texts:
                raise ValueError(f"two cells are named {name!r}: rename a row or a column")
            texts[name] = MISSING if pd.isna(value) else formats.get(column, "{}").format(value)
    return texts


def tabular(frame: pd.DataFrame, formats: Mapping[object, str], *, wrap: str = "") -> str:
    """``frame`` as a ``tabular``, or with ``wrap`` as a ``tabularx`` that breaks the column ``wrap`` into lines."""
    styler = frame.style.format(formats, na_rep=MISSING, escape="latex")
    styler = styler.format_index(escape="latex").format_index(escape="latex", axis=1)
    kinds = "".join(
        ">{\\raggedright\\arraybackslash}X" if name == wrap else "r" if pd.api.types.is_numeric_dtype(kind) else "l"
        for name, kind in frame.dtypes.items()
    )
    text = styler.to_latex(hrules=True, column_format=f"l{kinds}", multicol_align="c")
    if not wrap:
        return text
    return text.replace(r"\begin{tabular}", r"\begin{tabularx}{\linewidth}").replace(
        r"\end{tabular}", r"\end{tabularx}"
    )


def ledger(frame: pd.DataFrame) -> str:
    """``frame`` as a ``longtable`` without the index, with a wide first column."""
    wide, narrow = (rf">{{\raggedright\arraybackslash}}p{{{mm}mm}}" for mm in (43, 23))
    styler = frame.style.hide(axis="index").format(escape="latex")
    return styler.to_latex(environment="longtable", hrules=True, column_format=wide + (frame.shape[1] - 1) * narrow)
