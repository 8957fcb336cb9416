"""The smallest run with all the steps of a run: half a second in a process with the imports done."""

import os

from memstudy.trainers.language_model import LanguageModelRun

# Two threads that wait for each other are a hundred times slower when another process occupies one of the two cores.
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
    """Return `tiny_run` as the JSON values of a record's ``config``."""
    return tiny_run(**changes).model_dump(mode="json")


# A small stand-in for a notebook's kernel: a study and one sweep. Arguments: the results folder, the configs as JSON.
SWEEP = """
import json, sys
from memstudy.project import notebook_parameters
from memstudy.study import Study

class Planned(dict):
    timed = True

    def __iter__(self):  # as a run, which gives its fields by name
        return iter(self.items())

    def model_dump(self, *, mode):
        return dict(self)

folder, planned = sys.argv[1:]
places = {"results_dir": folder, "out_dir": folder, "run_missing": True}
study = Study("lab4_grid", notebook_parameters("lab4_grid") | places)
rows = study.sweep(Planned(config) for config in json.loads(planned))
print(rows["status"].to_json(orient="values"))
"""
