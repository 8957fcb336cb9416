"""The techniques that this machine can run, and the exact techniques with their settings."""

import importlib.util

from memstudy.techniques import TECHNIQUES

# Beside an adapter alone, or for some models alone: test_adapters has them. test_compiled has compile.
OF_ADAPTERS = {"qlora", "ia3", "prompt", "prefix", "convention", "nf4_weights", "int8_weights"}
INSTALLED = {name for name, t in TECHNIQUES.items() if all(map(importlib.util.find_spec, t.packages))}
ALONE = {
    name
    for name in INSTALLED - OF_ADAPTERS - {"compile"}
    if TECHNIQUES[name].in_training and not TECHNIQUES[name].several_processes
}
HERE = sorted(name for name in ALONE if not TECHNIQUES[name].requires)  # in one process; test_processes has the rest
EXACT = [
    "accumulation=2",
    "accumulation=4",
    "checkpointing",
    "checkpointing=2",
    "selective_checkpointing=0",
    "selective_checkpointing",
    "selective_checkpointing=1",
    "chunked_loss",
    "optimizer_in_backward",
]
