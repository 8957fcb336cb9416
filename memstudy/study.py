"""A study: asks for a table of runs, fills the missing rows, prints tables, figures and numbers from the rows.

study = Study("lab4_grid", globals())
rows = study.sweep(runs)                     # a tidy DataFrame, one row per run
study.table(frame, "comparison")             # report/tables/lab4_grid_comparison.tex, each cell a \\val
study.claims(rows)                           # the study's rows in the report's ledger of claims
study.figure(figure, "memory")               # figures/lab4_grid_memory.pdf
study.values({"budget_mib": 192.0})          # \\val{lab4_grid.budget_mib} in the LaTeX
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import pandas as pd
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler
from tqdm import tqdm

from memstudy import latex, launcher, machine, provenance, records
from memstudy.figures import use_style, write_figure
from memstudy.project import notebook_parameters

_TRADED = ("memory", "time", "quality_lost")
VERDICTS = ("reproduced", "partly", "not reproduced", "not testable here")
PUBLISHED = Path(__file__).parent / "studies" / "published"


def verdict(value: float, low: float, high: float, slack: float) -> str:
    """The verdict, one of ``VERDICTS``, on a claim of ``low`` to ``high`` when ``value`` was found.

    Reproduced if ``value`` is within ``slack`` of the range; partly if it has the same sign and is more than ``slack``
    away from 0; not testable here if it is missing.
    """
    if pd.isna(value):
        return "not testable here"
    if low - slack <= value <= high + slack:
        return "reproduced"
    same_way = value if low + high > 0 else -value
    return "partly" if same_way > slack else "not reproduced"


class Run(Protocol):
    """The runs that a sweep takes: frozen descriptions, whose non-default choices give the run id."""

    timed: bool  # whether other runs at the same time would spoil its timings

    def model_dump(self, *, mode: str) -> dict: ...

    def __iter__(self) -> Iterator[tuple[str, object]]: ...  # all choices as (name, value), for dict()


class Study:
    """One study's runs, and the tables, figures and values made from them.

    Parameters
    ----------
    stem : str
        The study's name, which is its notebook's stem.
    namespace : dict
        The notebook's ``globals()``, with the parameters of its parameters cell. ``results_dir``, ``out_dir`` and
        ``run_missing`` must be among the parameters; relative folders start at the notebook's folder.

    Raises
    ------
    ValueError
        If the results folder cannot be written.
    """

    def __init__(self, stem: str, namespace: dict):
        self.stem = stem
        self.parameters = {name: namespace[name] for name in notebook_parameters(stem)}
        places = ("results_dir", "out_dir", "run_missing")  # without influence on the numbers
        self._told = {name: value for name, value in self.parameters.items() if name not in places}
        base = records.ROOT / "notebooks"
        self._results = (base / self.parameters["results_dir"] / stem).resolve()
        self._out = (base / self.parameters["out_dir"]).resolve()
        self._run_missing = self.parameters["run_missing"]
        self._plan = os.environ.get(records.PLAN)
        self._machine = ""  # the device whose measurements count
        self._used: dict[str, dict] = {}
        self._verdicts: dict[str, str] = {}
        self._cells: dict[str, str] = {}
        self._columns: set[str] = set()  # columns of tables, whose rows differ by scale
        if self._run_missing:
            records.check_writable(self._results)
        use_style()

    def precision(self, asked: str | list[str]) -> list[str]:
        """The precision techniques for training: ``asked``, or for ``"auto"`` bf16 if it is fast on this machine.

        Each record gives the reason: ``bf16_speed`` in its provenance. Where the runs are for another machine,
        ``records.PRECISION`` says what is fast there.
        """
        if asked != "auto":
            return list(asked)
        if there := os.environ.get(records.PRECISION):
            return ["bf16"] if there == "bf16" else []
        return ["bf16"] if machine.bf16_is_fast() else []

    def sweep(self, runs: Iterable[Run], *, any_machine: bool = False) -> pd.DataFrame:
        """One row per run, in the order given; runs without a record are run now, untimed ones two at a time.

        A run that is killed, runs out of memory or raises becomes a row with that ``status``; the other runs continue.
        Columns: ``run_id``, ``status``, ``reason``, the run's fields, its metrics, ``curves`` (a mapping),
        ``data_source``, ``device``, ``commit``.

        With ``any_machine``, records of other machines count too, as is right where no time is shown.

        Raises
        ------
        MissingRecords
            If rows are missing and ``run_missing`` is false, or only a plan is wanted (``records.PLAN``).
        """
        planned = {records.run_id(run.model_dump(mode="json")): run for run in runs}
        configs = {name: run.model_dump(mode="json") for name, run in planned.items()}
        known = self._known(configs, any_machine)
        missing = [name for name in configs if name not in known]
        for name in missing if self._plan else ():
            Path(self._plan, f"{name}.json").write_text(json.dumps(configs[name]), encoding="utf-8")
        if missing and (self._plan or not self._run_missing):
            first = configs[missing[0]]
            raise records.MissingRecords(
                f"{len(missing)} of {len(configs)} runs have no record in {self._results} (first: "
                f"{first.get('experiment')}, run {missing[0]}): run the study at this scale first"
            )
        if missing:
            with tqdm(total=len(missing), desc=self.stem, unit="run", file=sys.stderr, mininterval=1) as bar:
                for name, record in self._run(missing, planned, configs):
                    bar.update()
                    bar.set_postfix_str(str(configs[name].get("experiment", name)))
                    known[name] = record
                    if record["status"] == "failed":
                        warnings.warn(f"run {name}: {record['reason']}", stacklevel=2)
        self._used |= {name: {"study": self.stem} | known[name] for name in configs}
        return pd.DataFrame([records.as_row(known[name], run) for name, run in planned.items()])

    def _run(self, names: list[str], planned: dict[str, Run], configs: dict[str, dict]) -> Iterator[tuple[str, dict]]:
        """Carry out the runs ``names``: the untimed ones two at a time, then the timed ones one by one."""
        untimed = {name: configs[name] for name in names if not planned[name].timed}
        yield from launcher.spawn_together(untimed, self._results)
        for name in names:
            if name not in untimed:
                yield name, launcher.spawn(configs[name], self._results)

    def trials(self, run: Run, *, budget_mib: float) -> Callable[[int], float | None]:
        """The trial for ``profiler.batch_size.largest_batch``: batch -> measured peak [MiB], None if over budget."""

        def trial(batch_size: int) -> float | None:
            tried = run.model_copy(update={"batch_size": batch_size, "budget_mib": budget_mib})
            row = self.sweep([tried]).iloc[0]
            if row["status"] not in ("ok", "oom"):
                raise RuntimeError(f"batch {batch_size}: {row['status']}: {row['reason']}")
            return row["peak_allocated_mib"] if row["status"] == "ok" else None

        return trial

    def table(
        self, frame: pd.DataFrame, label: str, digits: int | str | Mapping | None = None, *, wrap: str = ""
    ) -> Styler:
        """Write ``frame`` as ``report/tables/<stem>_<label>.tex`` and return it styled, for display.

        The unit in brackets in a header, or ``digits``, sets the number format (see `latex.formats`); missing values
        print as a dash. ``wrap`` names a column of long text that is broken into lines. Each cell is also a value,
        ``\\val{<stem>.<label>.<row>.<column>}``, with names made by `latex.key`.
        """
        frame = frame.rename_axis(index=None)
        formats = latex.formats(frame, digits)
        path = self._file("report/tables", f"{self.stem}_{label}.tex")
        path.write_text(latex.tabular(frame, formats, wrap=wrap), encoding="utf-8")
        self._cells |= {f"{label}.{name}": text for name, text in latex.cells(frame, formats).items()}
        self._columns |= {f"{label}.{latex.key(column)}" for column in frame}
        return frame.style.format(formats, na_rep=latex.MISSING)

    def trade_offs(
        self,
        *,
        memory: pd.Series,
        time: pd.Series,
        quality_lost: pd.Series,
        predicted: Mapping[str, pd.DataFrame] = MappingProxyType({}),
    ) -> pd.DataFrame:
        """Write what each technique saves and costs, for the report's synthesis over all studies.

        Parameters
        ----------
        memory, time : pd.Series
            By technique: peak and time of a step relative to the baseline, measured; techniques that lack one are left
            out.
        quality_lost : pd.Series
            Rise of the perplexity or fall of the score [%], measured; missing if not measured.
        predicted : mapping
            By GPU: ``memory`` and ``time`` as predicted for it. A row's ``device`` is the GPU, or ``here``.
        """
        by_device = {"here": pd.DataFrame({"memory": memory, "time": time}), **predicted}
        rows = pd.concat(by_device, names=["device", "technique"]).reset_index("device")
        rows = rows.join(quality_lost.rename("quality_lost")).astype(dict.fromkeys(_TRADED, float))
        rows = rows.dropna(subset=["memory", "time"])[[*_TRADED, "device"]]
        rows.to_csv(self._file("report/tradeoffs", f"{self.stem}.csv"))
        return rows

    def claims(self, rows: Iterable[tuple[str, str, str, str, str]]) -> Styler:
        """Write the study's rows of the report's ledger of claims, and return them styled, for display.

        A row has the claim, the published, predicted and measured results ("–" for none), and the verdict, by
        `verdict` or by a rule stated in the notebook. The count of each verdict is among the values.

        Raises
        ------
        ValueError
            For a verdict that is not in ``VERDICTS``.
        """
        frame = pd.DataFrame(rows, columns=["claim", "published", "predicted", "measured", "verdict"])
        if unknown := set(frame["verdict"]) - set(VERDICTS):
            raise ValueError(f"verdict {min(unknown)!r}: one of {', '.join(VERDICTS)} is needed")
        count = frame["verdict"].value_counts()
        self._verdicts = {"n_claims": str(len(frame))} | {
            f"n_{verdict.replace(' ', '_')}": str(count.get(verdict, 0)) for verdict in VERDICTS
        }
        self._file("report/tables", f"{self.stem}_ledger.tex").write_text(latex.ledger(frame), encoding="utf-8")
        return frame.style.hide(axis="index")

    def figure(self, figure: Figure, label: str) -> None:
        """Write ``figure`` as ``figures/<stem>_<label>.pdf``, and as PNG beside it for web pages."""
        write_figure(figure, self._file("figures", f"{self.stem}_{label}.pdf"))

    def values(self, values: dict[str, object]) -> None:
        """Write ``values``, the cells of the tables and the captions' provenance for the report's ``\\val``.

        The unit at the end of a name (``_mib``, ``_percent``, ``_x``) sets the number format; see `latex.printed`. A
        series gives one value per row, ``\\val{<stem>.<name>.<row>}``; a row that a scale lacks prints as a dash.

        Call this method last: device, commit and data cover all rows used so far. Parameters that are numbers or texts
        become values under their own names.
        """
        used, parameters = list(self._used.values()), self._told
        said = provenance.said(used, parameters, self.stem)
        scalars = {name: value for name, value in parameters.items() if type(value) in (int, float, str)}
        series = {name: value for name, value in values.items() if isinstance(value, pd.Series)}
        given = {name: f"{value:g}" if type(value) is float else value for name, value in scalars.items()}
        given |= {name: value for name, value in values.items() if name not in series}
        every = {name: latex.printed(name, value) for name, value in given.items()}
        for name, rows in series.items():
            every |= {f"{name}.{latex.key(row)}": latex.printed(name, value) for row, value in rows.items()}
        every |= self._cells | self._verdicts | said
        lines = [f"\\defval{{{self.stem}.{key}}}{{{latex.escape(text)}}}" for key, text in every.items()]
        lines += [f"\\defcolumn{{{self.stem}.{name}}}" for name in sorted(self._columns | series.keys())]
        path = self._file("report/values", f"{self.stem}.tex")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        appendix = provenance.appendix(used, parameters)
        self._file("report/tables", f"{self.stem}_provenance.tex").write_text(appendix, encoding="utf-8")

    def published(self, name: str) -> pd.DataFrame:
        """The published numbers in ``published/<name>.csv``."""
        path = PUBLISHED / f"{name}.csv"
        if not path.exists():
            known = ", ".join(sorted(p.stem for p in PUBLISHED.glob("*.csv")))
            raise ValueError(f"no published figures {name!r}; there are: {known}")
        return pd.read_csv(path)

    def _known(self, configs: dict[str, dict], any_machine: bool) -> dict[str, dict]:
        """Records of ``configs`` that count: settled records of one machine, and predictions valid on that machine.

        With ``any_machine``, the records of other machines fill the gaps.

        The machine is this one; if nothing may be run, it is the machine with most records in the first sweep, so that
        no table mixes timings of two machines. A prediction for a GPU is valid wherever the packages are the same.
        """
        settled = []
        # The other studies' folders count too: a run that two studies ask for is run once.
        for folder in sorted(self._results.parent.glob("*/"), key=lambda folder: folder == self._results):
            for path, record in records.iterate_records(folder, configs):
                if record["status"] in records.SETTLED:
                    settled.append(record | {"curves": records.Curves(path), "study": folder.name})
        here = os.environ.get(records.MACHINE) or machine.device()
        if self._run_missing:
            self._machine = here
        elif not self._machine:
            count = Counter(r["provenance"]["device"] for r in settled if not provenance.is_prediction(r))
            self._machine = max(count, key=lambda name: (count[name], name == here), default="")
        versions = {name: version for name, version in machine.versions().items() if version != "not installed"}
        known: dict[str, dict] = {}
        for record in settled:
            where = record["provenance"]
            usable = where["device"] == self._machine or (any_machine and record["run_id"] not in known)
            if provenance.is_prediction(record) and not usable:
                same = versions.items() <= where["packages"].items() and record["config"].get("gpu")
                usable = record["status"] == "ok" and (same or not self._run_missing) and record["run_id"] not in known
            if usable:
                known[record["run_id"]] = record
        return known

    def _file(self, folder: str, name: str) -> Path:
        path = self._out / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
