"""The smallest run that does everything a run does: half a second in a process with the imports done."""

import os

from memstudy.trainers.language_model import LanguageModelRun

# Two threads that wait for each other take a hundred times as long when something else has one of their two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def tiny_run(**changes) -> LanguageModelRun:
    """Return a run of a two-layer model on random tokens, with ``changes``."""
    sizes = {
        "n_layers": 2,
        "hidden_size": 32,
        "n_heads": 2,
        "feed_forward": 64,
        "vocab_size": 300,
        "seq_len": 16,
        "batch_size": 2,
        "measure_steps": 1,
    }
    return LanguageModelRun(**{"experiment": "tiny", **sizes, **changes})


def tiny_config(**changes) -> dict:
    """Return the same as the JSON values of a record's ``config``."""
    return tiny_run(**changes).model_dump(mode="json")


# A notebook's kernel in small: a study and one sweep; its arguments are the results' folder and the configs as JSON.
SWEEP = """
import json, sys
from memstudy.project import notebook_parameters
from memstudy.study import Study

class Planned(dict):
    def model_dump(self, *, mode):
        return dict(self)

folder, planned = sys.argv[1:]
places = {"results_dir": folder, "out_dir": folder, "run_missing": True}
study = Study("lab4_grid", notebook_parameters("lab4_grid") | places)
rows = study.sweep(Planned(config) for config in json.loads(planned))
print(rows[["seed", "status"]].to_json(orient="values"))
"""
