"""A study: asks for a table of runs, fills the missing rows, prints tables, figures and numbers from the rows.

study = Study("lab4_grid", globals())
rows = study.sweep(runs)                     # a tidy DataFrame, one row a run
study.table(frame, "comparison", "{:.1f}")   # report/tables/lab4_grid_comparison.tex
study.claims(rows)                           # its rows of the report's ledger of claims
study.figure(figure, "memory")               # figures/lab4_grid_memory.pdf
study.values({"baseline_peak_mib": "1,098"}) # \\val{lab4_grid.baseline_peak_mib} in the LaTeX
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import pandas as pd
from matplotlib.figure import Figure
from pandas.io.formats.style import Styler
from tqdm import tqdm

from memstudy import launcher, machine, records
from memstudy.figures import use_style, write_figure
from memstudy.latex import breakable, escape
from memstudy.project import notebook_parameters

VERDICTS = ("reproduced", "partly", "not reproduced", "not testable here")
PUBLISHED = Path(__file__).parent / "studies" / "published"


class Run(Protocol):
    """What a sweep takes: a frozen description that gives its every choice as JSON values."""

    def model_dump(self, *, mode: str) -> dict: ...


class Study:
    """One study's runs and what is printed from them.

    Parameters
    ----------
    stem : str
        The study's name, that of its notebook.
    namespace : dict
        The notebook's ``globals()``. Of it the parameters are taken: those of the notebook's parameters cell.
        ``results_dir``, ``out_dir`` and ``run_missing`` must be among them; relative folders start at the
        notebook's.

    Raises
    ------
    ValueError
        When the results folder cannot be written.
    """

    def __init__(self, stem: str, namespace: dict):
        self.stem = stem
        self.parameters = {name: namespace[name] for name in notebook_parameters(stem)}
        base = records.ROOT / "notebooks"
        self._results = (base / self.parameters["results_dir"] / stem).resolve()
        self._out = (base / self.parameters["out_dir"]).resolve()
        self._run_missing = self.parameters["run_missing"]
        self._plan = os.environ.get(records.PLAN)
        self._machine = ""  # whose measurements count
        self._used: dict[str, dict] = {}
        self._verdicts: dict[str, str] = {}
        if self._run_missing:
            records.check_writable(self._results)
        use_style()

    def precision(self, asked: str | list[str]) -> list[str]:
        """The techniques for the precision of trainings: those ``asked`` for; of ``auto``, ``bf16`` where it is fast.

        Each run's record says why: ``bf16_speed`` in its provenance.
        """
        if asked != "auto":
            return list(asked)
        return ["bf16"] if machine.bf16_is_fast() else []

    def sweep(self, runs: Iterable[Run]) -> pd.DataFrame:
        """One row a run, in the order given; runs without a record here are run now, one after another.

        A run that is killed, runs out of memory or raises is a row with that ``status``; the others go on. Columns:
        ``run_id``, ``status``, ``reason``, the run's fields, its metrics, ``curves`` (a mapping), ``data_source``,
        ``device``, ``commit``.

        Raises
        ------
        MissingRecords
            When rows are missing and ``run_missing`` is false, or they are only to be planned (``records.PLAN``).
        """
        configs = {records.run_id(c): c for c in (run.model_dump(mode="json") for run in runs)}
        known = self._known(configs)
        missing = [name for name in configs if name not in known]
        if missing and self._plan:
            for name in missing:
                Path(self._plan, f"{name}.json").write_text(json.dumps(configs[name]), encoding="utf-8")
        if missing and (self._plan or not self._run_missing):
            first = configs[missing[0]]
            raise records.MissingRecords(
                f"{len(missing)} of {len(configs)} runs have no record in {self._results} (first: "
                f"{first.get('experiment')}, run {missing[0]}): run the study at this scale first"
            )
        if missing:
            with tqdm(missing, desc=self.stem, unit="run", file=sys.stderr, mininterval=1) as bar:
                for name in bar:
                    bar.set_postfix_str(str(configs[name].get("experiment", name)))
                    known[name] = launcher.spawn(configs[name], self._results)
                    if known[name]["status"] == "failed":
                        warnings.warn(f"run {name}: {known[name]['reason']}", stacklevel=2)
        self._used |= {name: known[name] for name in configs}
        return pd.DataFrame([_row(known[name]) for name in configs])

    def trials(self, run: Run, *, budget_mib: float) -> Callable[[int], float | None]:
        """What ``profiler.batch_size.largest_batch`` calls: batch -> measured peak [MiB], None when over the budget."""

        def trial(batch_size: int) -> float | None:
            update = {"batch_size": batch_size, "budget_mib": budget_mib}
            row = self.sweep([run.model_copy(update=update)]).iloc[0]
            if row["status"] not in ("ok", "oom"):
                raise RuntimeError(f"batch {batch_size}: {row['status']}: {row['reason']}")
            return row["peak_allocated_mib"] if row["status"] == "ok" else None

        return trial

    def table(self, frame: pd.DataFrame, label: str, formats: str | dict, *, wrap: str = "") -> Styler:
        """Write ``frame`` as ``report/tables/<stem>_<label>.tex`` and give it back styled, for display.

        ``formats`` says how numbers print, for all columns or by column, as pandas' ``Styler.format`` takes it;
        what is missing prints as a dash. ``wrap`` names a column of long text, to be broken into lines.
        """
        frame = frame.rename_axis(index=None)
        latex = frame.style.format(formats, na_rep="–", escape="latex")
        latex = latex.format_index(escape="latex").format_index(escape="latex", axis=1)
        kinds = "".join(
            ">{\\raggedright\\arraybackslash}X" if name == wrap else "r" if pd.api.types.is_numeric_dtype(kind) else "l"
            for name, kind in frame.dtypes.items()
        )
        text = latex.to_latex(hrules=True, column_format=f"l{kinds}", multicol_align="c")
        if wrap:
            text = text.replace(r"\begin{tabular}", r"\begin{tabularx}{\linewidth}").replace(
                r"\end{tabular}", r"\end{tabularx}"
            )
        path = self._file("report/tables", f"{self.stem}_{label}.tex")
        path.write_text(text, encoding="utf-8")
        return frame.style.format(formats, na_rep="–")

    def trade_offs(self, *, memory: pd.Series, time: pd.Series, quality_lost: pd.Series) -> pd.DataFrame:
        """Write what each technique saves and costs, measured, for the report's synthesis over studies.

        Parameters
        ----------
        memory, time : pd.Series
            By technique: peak and time of a step, the baseline's being 1; where one is missing there is no row.
        quality_lost : pd.Series
            [%]: by how much perplexity rises or a score falls; missing where it was not measured.
        """
        rows = pd.DataFrame({"memory": memory, "time": time, "quality_lost": quality_lost}).astype(float)
        rows = rows.dropna(subset=["memory", "time"]).rename_axis("technique")
        rows.to_csv(self._file("report/tradeoffs", f"{self.stem}.csv"))
        return rows

    def claims(self, rows: Iterable[tuple[str, str, str, str, str]]) -> Styler:
        """Write the sources' claims for the report's ledger of all studies' claims; give them back for display.

        A row has the claim, what is published, predicted and measured, "–" where nothing is, and the verdict, one of
        ``VERDICTS``, by a rule that the notebook states. How many there are of each is among the values.

        Raises
        ------
        ValueError
            For another verdict.
        """
        frame = pd.DataFrame(rows, columns=["claim", "published", "predicted", "measured", "verdict"])
        unknown = set(frame["verdict"]) - set(VERDICTS)
        if unknown:
            raise ValueError(f"verdict {min(unknown)!r}: one of {', '.join(VERDICTS)} is needed")
        count = frame["verdict"].value_counts()
        self._verdicts = {"n_claims": str(len(frame))} | {
            f"n_{verdict.replace(' ', '_')}": str(count.get(verdict, 0)) for verdict in VERDICTS
        }
        styler = frame.style.hide(axis="index")
        wide, narrow = (rf">{{\raggedright\arraybackslash}}p{{{mm}mm}}" for mm in (43, 23))
        latex = styler.format(escape="latex").to_latex(
            environment="longtable", hrules=True, column_format=wide + 4 * narrow
        )
        self._file("report/tables", f"{self.stem}_ledger.tex").write_text(latex, encoding="utf-8")
        return frame.style.hide(axis="index")

    def figure(self, figure: Figure, label: str) -> None:
        """Write ``figure`` as ``figures/<stem>_<label>.pdf``, and as PNG beside it for web pages."""
        write_figure(figure, self._file("figures", f"{self.stem}_{label}.pdf"))

    def values(self, values: dict[str, str]) -> None:
        """Write ``values`` for the report's ``\\val``, with what every caption says, and the provenance.

        Call it last: device, commit and data are those of all rows that the study has used. Of a study that only
        predicts they say that nothing was run, and name the commit that predicted. Parameters that are a number or a
        text are values too, by their own names.
        """
        used = list(self._used.values())
        measured = [record for record in used if not _is_prediction(record)]
        sources = sorted({f"{r['data']['name']} ({r['data']['source']})" for r in used if r["data"]})
        commits = sorted({_commit(record["provenance"]) for record in used}) or [_commit(records.git_state())]
        said = {
            "parameters_hash": records.run_id(self._told_parameters())[:8],
            "commit": ", ".join(commits),
            "dataset": ", ".join(sources) or "random tokens",
            "device": "; ".join(sorted({r["provenance"]["device"] for r in measured})) or "nothing was run",
            "n_runs": str(len(measured)),
            "n_predictions": str(len(used) - len(measured)),
        }
        scalars = {name: value for name, value in self._told_parameters().items() if type(value) in (int, float, str)}
        given = {
            name: f"{v:,}" if isinstance(v, int) else f"{v:g}" if isinstance(v, float) else v
            for name, v in scalars.items()
        }
        every = given | values | self._verdicts | said
        lines = [f"\\defval{{{self.stem}.{key}}}{{{escape(text)}}}" for key, text in every.items()]
        path = self._file("report/values", f"{self.stem}.tex")
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        self._file("report/tables", f"{self.stem}_provenance.tex").write_text(self._provenance(), encoding="utf-8")

    def published(self, name: str) -> pd.DataFrame:
        """The published figures of ``published/<name>.csv``."""
        path = PUBLISHED / f"{name}.csv"
        if not path.exists():
            known = ", ".join(sorted(p.stem for p in PUBLISHED.glob("*.csv")))
            raise ValueError(f"no published figures {name!r}; there are: {known}")
        return pd.read_csv(path)

    def _known(self, configs: dict[str, dict]) -> dict[str, dict]:
        """Records of ``configs`` that count: settled ones of one machine, and predictions that it would make too.

        The machine is this one; where nothing may be run, the one with most records of those first asked for, lest two
        machines' timings stand in one table. A prediction for a GPU is the same on any machine with the same packages.
        """
        settled = []
        for path, record in records.iterate_records(self._results, configs):
            if record["status"] in records.SETTLED:
                settled.append(record | {"curves": records.Curves(path)})
        here = os.environ.get(records.MACHINE) or machine.device()
        if self._run_missing:
            self._machine = here
        elif not self._machine:
            count = Counter(r["provenance"]["device"] for r in settled if not _is_prediction(r))
            self._machine = max(count, key=lambda name: (count[name], name == here), default="")
        versions = {name: version for name, version in records.versions().items() if version != "not installed"}
        known: dict[str, dict] = {}
        for record in settled:
            where = record["provenance"]
            usable = where["device"] == self._machine
            if _is_prediction(record) and not usable:
                same = versions.items() <= where["packages"].items() and record["config"]["gpu"]
                usable = record["status"] == "ok" and (same or not self._run_missing) and record["run_id"] not in known
            if usable:
                known[record["run_id"]] = record
        return known

    def _told_parameters(self) -> dict:
        places = ("results_dir", "out_dir", "run_missing")  # say nothing about the numbers
        return {name: value for name, value in self.parameters.items() if name not in places}

    def _file(self, folder: str, name: str) -> Path:
        path = self._out / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def _provenance(self) -> str:
        """LaTeX: machines and versions, data, parameters, then the run of every record, by commit and experiment."""
        used = list(self._used.values())
        machines = {
            (p["device"], p["cpu"], p["platform"], tuple(p["packages"].items()))
            for p in (record["provenance"] for record in used)
        }
        data = {
            (d["name"], d["source"], d["revision"], d["content_hash"]) for d in (record["data"] for record in used) if d
        }
        lines = []
        for device, cpu, platform, packages in sorted(machines):
            versions = ", ".join(f"{name} {version}" for name, version in packages)
            name = device if device == cpu else f"{device}, {cpu}"
            lines.append(f"Machine: {name}; {platform}; {versions}.")
        for name, source, revision, content_hash in sorted(data):
            lines.append(f"Data: {name}, from {source}, revision {revision}, SHA-256 {content_hash}.")
        if not used:
            versions = ", ".join(f"{name} {version}" for name, version in records.versions().items())
            lines.append(f"Nothing was run; predicted with {versions}.")
        parameters = "; ".join(f"{k} = {v}" for k, v in self._told_parameters().items())
        lines.append(f"Parameters: {parameters}.")
        text = "\n\n".join(rf"\noindent {breakable(line)}" for line in lines)
        by_commit: dict[str, dict[str, list[dict]]] = {}
        for record in used:
            state = [record["status"]] * (record["status"] != "ok") + ["predicted"] * _is_prediction(record)
            name = str(record["config"].get("experiment", "run")) + f" ({', '.join(state)})" * bool(state)
            by_commit.setdefault(_commit(record["provenance"]), {}).setdefault(name, []).append(record)
        for commit, experiments in sorted(by_commit.items()):
            dates = sorted(r["provenance"]["started"][:10] for of_it in experiments.values() for r in of_it)
            days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
            listed = "; ".join(
                f"{breakable(name)}: " + " ".join(rf"\run{{{self.stem}}}{{{r['run_id']}}}" for r in of_it)
                for name, of_it in experiments.items()
            )
            text += f"\n\n\\noindent Commit \\texttt{{{commit}}}, {days}: {listed}."
        return text + "\n"


def _is_prediction(record: dict) -> bool:
    """True for a prediction's record: its config has ``of``."""
    return "of" in record["config"]


def _commit(state: dict) -> str:
    """The commit's first seven digits, with a plus when what a run depends on differed from it."""
    return state["commit"][:7] + "+" * state["dirty"]


def _row(record: dict) -> dict:
    config = {
        name: "+".join(map(str, value)) if isinstance(value, list) else value
        for name, value in record["config"].items()
    }
    return {
        "run_id": record["run_id"],
        "status": record["status"],
        "reason": record["reason"],
        **config,
        **record["metrics"],
        "curves": record["curves"],
        "data_source": record["data"].get("source"),
        "device": record["provenance"]["device"],
        "commit": record["provenance"]["commit"],
    }
