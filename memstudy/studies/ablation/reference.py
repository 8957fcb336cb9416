"""The reference rows of ``memstudy advise``: what the package keeps of the memory ablation's records.

``python -m memstudy.studies.ablation.reference`` makes the file anew from ``results/``, in the repository: after the
ablation has been run at full scale on another machine, that machine's rows are among the file's.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from memstudy import machine, records

FILE = Path(__file__).with_name("reference.json")
STUDIES = "memory_ablation", "memory_combinations"  # whose records have reference steps
METRICS = "step_time_ms", "peak_allocated_mib"


class Reference(NamedTuple):
    """Steps of the ablation's model measured on one machine.

    Attributes
    ----------
    device : str
        The machine.
    rows : dict
        ``METRICS`` for each set of techniques, including the empty set, the baseline.
    """

    device: str
    rows: dict[frozenset[str], dict[str, float]]

    def time_ratio(self, techniques: Iterable[str]) -> float | None:
        """Step time with ``techniques`` relative to none; None for a set that was not measured."""
        row = self.rows.get(frozenset(techniques))
        return row and row["step_time_ms"] / self.rows[frozenset()]["step_time_ms"]


def advised() -> list[str]:
    """The techniques that the decision table chooses from at full scale."""
    return json.loads(FILE.read_text("utf-8"))["advised"]


def reference() -> Reference:
    """The steps measured on this machine; if the file has none of this machine, those of the first machine."""
    by_device = json.loads(FILE.read_text("utf-8"))["measured"]
    device = machine.device() if machine.device() in by_device else next(iter(by_device))
    return Reference(device, {frozenset(row.pop("techniques")): row for row in by_device[device]})


def made() -> dict[str, object]:
    """The file's content, from the records and the parameters in the repository.

    Raises
    ------
    ValueError
        When no machine has a record of the baseline.
    """
    from memstudy.project import read_parameters
    from memstudy.studies.ablation.experiments import SIZE
    from memstudy.trainers.language_model import LanguageModelRun

    parameters, results = read_parameters(STUDIES[0], "full"), records.ROOT / "results"
    by_device: dict[str, dict[tuple[str, ...], dict]] = {}
    for record in itertools.chain.from_iterable(records.read_records(results / study) for study in STUDIES):
        if record["config"]["kind"] != "language_model" or not record["metrics"].keys() >= set(METRICS):
            continue  # another kind, or without times: failed, or bfloat16 was emulated
        run = LanguageModelRun.model_validate(record["config"])
        if all(getattr(run, name) == parameters[name] for name in SIZE):
            row = {"techniques": sorted(run.techniques)} | {name: record["metrics"][name] for name in METRICS}
            by_device.setdefault(record["provenance"]["device"], {})[tuple(row["techniques"])] = row
    measured = {
        device: [rows[techniques] for techniques in sorted(rows)] for device, rows in by_device.items() if () in rows
    }
    if not measured:
        raise ValueError(
            f"no reference rows in {results} to order techniques by: run memstudy report {STUDIES[0]} --scale full"
        )
    return {"advised": read_parameters(STUDIES[1], "full")["advised"], "measured": measured}


def text() -> str:
    """The file's text: a row a line."""
    content = made()
    machines = ",\n".join(
        f" {json.dumps(device)}: [\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n ]"
        for device, rows in content["measured"].items()
    )
    return f'{{"advised": {json.dumps(content["advised"])},\n"measured": {{\n{machines}\n}}}}\n'


if __name__ == "__main__":
    FILE.write_text(text(), "utf-8")
