"""The provenance of a study's numbers, for its captions and for the report's appendix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from memstudy import machine, records
from memstudy.latex import breakable


def is_prediction(record: dict) -> bool:
    """True for a prediction's record: its config has ``of``."""
    return "of" in record["config"]


def said(used: Sequence[dict], parameters: dict, stem: str) -> dict[str, str]:
    """The captions' text on the records ``used``, as values of the report.

    If the study only predicts, ``device`` says that nothing was run; ``commit`` is the newest that made a record. Runs
    and predictions are counted only in the study that made them, here ``stem``, since the report adds all studies up.
    """
    measured = [record for record in used if not is_prediction(record)]
    sources = sorted({f"{r['data']['name']} ({r['data']['source']})" for r in used if r["data"]})
    in_order = sorted(used, key=lambda record: record["provenance"]["started"])
    commits = list(dict.fromkeys(_commit(record["provenance"]) for record in reversed(in_order)))
    own = Counter(is_prediction(record) for record in used if record["study"] == stem)
    return {
        "parameters_hash": records.run_id(parameters)[:8],
        "commit": _newest(commits or [_commit(records.git_state())]),
        "dataset": ", ".join(sources) or "random tokens",
        "device": "; ".join(sorted({r["provenance"]["device"] for r in measured})) or "nothing was run",
        "n_runs": str(own[False]),
        "n_predictions": str(own[True]),
    }


def appendix(used: Sequence[dict], parameters: dict) -> str:
    """LaTeX text: machines and versions, data, parameters, then every run by commit and experiment.

    A record's ``study`` is the study whose folder holds the record.
    """
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
        versions = ", ".join(f"{name} {version}" for name, version in machine.versions().items())
        lines.append(f"Nothing was run; predicted with {versions}.")
    lines.append(f"Parameters: {'; '.join(f'{name} = {value}' for name, value in parameters.items())}.")
    return "\n\n".join([*(rf"\noindent {breakable(line)}" for line in lines), *_runs(used)]) + "\n"


def _runs(used: Sequence[dict]) -> list[str]:
    """A paragraph for each commit, with links to its records by experiment."""
    by_commit: dict[str, dict[str, list[dict]]] = {}
    for record in used:
        state = [record["status"]] * (record["status"] != "ok") + ["predicted"] * is_prediction(record)
        name = str(record["config"].get("experiment", "run")) + f" ({', '.join(state)})" * bool(state)
        by_commit.setdefault(_commit(record["provenance"]), {}).setdefault(name, []).append(record)
    paragraphs = []
    for commit, experiments in sorted(by_commit.items()):
        dates = sorted(r["provenance"]["started"][:10] for of_one in experiments.values() for r in of_one)
        days = " to ".join(dict.fromkeys((dates[0], dates[-1])))
        listed = "; ".join(
            f"{breakable(name)}: " + " ".join(rf"\run{{{r['study']}}}{{{r['run_id']}}}" for r in of_one)
            for name, of_one in experiments.items()
        )
        paragraphs.append(f"\\noindent Commit \\texttt{{{commit}}}, {days}: {listed}.")
    return paragraphs


def _newest(commits: Sequence[str]) -> str:
    """The first of ``commits``, and how many others there are; the appendix has them all."""
    return commits[0] + (f" and {len(commits) - 1} earlier" if len(commits) > 1 else "")


def _commit(state: dict) -> str:
    """The commit's first seven digits, with a plus if the sources of runs differed from the commit."""
    return state["commit"][:7] + "+" * state["dirty"]
