"""The LaTeX uses all that the notebooks write, and the parameter files set parameters that the notebooks have."""

import json
import re
import subprocess
from pathlib import Path

import nbformat
import pytest

from memstudy import project

ROOT = Path(__file__).parents[1]
STEMS = project.studies()


def code_cells(stem):
    cells = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def test_there_are_studies():
    assert "lab4_grid" in STEMS


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("scale", ["quick", "full", "gpu"])
def test_parameter_files_set_what_the_notebook_has(stem, scale):
    assert project.read_parameters(stem, scale)


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("kind", ["table", "figure"])
def test_every_table_and_figure_is_made_and_used(stem, kind):
    source = "\n".join(cell.source for cell in code_cells(stem))
    made = set(re.findall(rf'study\.{kind}\(.+?, "(\w+)"', source))
    section = (ROOT / "report" / "sections" / f"{stem}.tex").read_text()
    used = re.findall(rf"\\study{kind}\*?(?:\[\w+\])?{{{stem}}}{{(\w+)}}", section)
    assert made
    assert sorted(made) == sorted(used)
    assert ("study.claims(" in source) == (rf"\claims{{{stem}}}" in section)


@pytest.mark.parametrize("stem", STEMS)
def test_captions_name_their_kind_of_number(stem):
    section = (ROOT / "report" / "sections" / f"{stem}.tex").read_text()
    kinds = re.findall(rf"\\study(?:table|figure)\*?(?:\[\w+\])?{{{stem}}}{{\w+}}{{([^}}]*)}}", section)
    assert all(re.search("measured|predicted|published", kind) for kind in kinds)


@pytest.mark.parametrize("stem", STEMS)
def test_a_notebook_tells_a_story_and_defines_nothing(stem):
    cells = code_cells(stem)
    for cell in cells:
        assert not re.search(r"^\s*(def|class|try)\b", cell.source, re.MULTILINE), cell.source
    strict = [cell for cell in cells if "nbval-check-output" in cell.metadata.get("tags", [])]
    assert len(strict) >= 2
    assert all(cell.outputs and cell.execution_count for cell in strict), (
        "a strict cell has no numbered output, so nothing to compare with: run the notebook"
    )


@pytest.mark.parametrize("stem", [*STEMS, project.SYNTHESIS])
def test_a_notebooks_cells_are_few_and_short(stem):
    """Ruff finds long lines of code; this test also finds long lines of text."""
    cells = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert len(code) <= 25
    for cell in code:
        assert len(cell.source.splitlines()) <= 15 or "parameters" in cell.metadata.get("tags", []), cell.source
    assert max(len(line) for cell in cells for line in cell.source.splitlines()) <= 120


def test_no_reference_row_was_made_by_code_that_is_not_committed():
    listed = subprocess.run(["git", "ls-files", "results"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout, so which records are the reference's is not known")
    records = [ROOT / line for line in listed.stdout.splitlines()]
    assert len(records) > 900
    assert [path.name for path in records if json.loads(path.read_text("utf-8"))["provenance"]["dirty"]] == []


@pytest.mark.parametrize("stem", STEMS)
def test_every_citation_has_a_reference(stem):
    known = set(re.findall(r"^@\w+{([^,]+),", (ROOT / "report" / "references.bib").read_text(), re.MULTILINE))
    for path in [ROOT / "report" / "main.tex", ROOT / "report" / "sections" / f"{stem}.tex"]:
        cited = {key for keys in re.findall(r"\\cite[tp]?{([^}]+)}", path.read_text()) for key in keys.split(",")}
        assert cited <= known


NO_PROSE = re.compile(
    r"(?<!\\)%.*"  # comments
    r"|\\begin\{equation\}[\s\S]*?\\end\{equation\}|\$[^$]*\$"
    r"|\\(?:\w*ref|label|cite\w*|val|total|stem|notebook|input|url|usepackage|documentclass|setlength|ifstudy|IfFileExists)(?:\[[^]]*\])?\{[^}]*\}"
    r"|\\(?:study\w+|claims)\*?(?:\[\w+\])?\{\w+\}(?:\{\w+\})?"
    r"|\bLab 4\b|\b(?:8|16)[- ]bits?\b"  # names
    r"|\b20\d\d\b|\b\d+(?:pt|mm)\b"  # years; lengths on the page
    r"|(?<![\w-])[01]\b(?!\\,|[.,]\d)"  # 0 or 1 without a unit
)
TYPED = re.compile(r"(?<![\w\\-])[+-]?\d[\d.,]*")


def typed_numbers(latex: str) -> list[str]:
    return TYPED.findall(NO_PROSE.sub(" ", latex))


@pytest.mark.parametrize("name", ["main.tex", *(f"sections/{stem}.tex" for stem in STEMS)])
def test_no_number_in_the_prose_is_typed_by_hand(name):
    assert typed_numbers((ROOT / "report" / name).read_text()) == []


@pytest.mark.parametrize(
    ("latex", "found"),
    [
        (r"saves 42\,\% of \val{a.peak_1}\,MiB", ["42"]),
        (r"BERT-large in fp32, SST-2, $2dr + 17$ weights, in 16 bits, in 2022, % and 99", []),
        (r"1\,\% or 1.5 or 0", ["1", "1.5"]),
        (r"of 8\,192 tokens (Table~\ref{tab:x_2}), 0.6988", ["8", "192", "0.6988"]),
    ],
)
def test_typed_numbers_are_found(latex, found):
    assert typed_numbers(latex) == found
