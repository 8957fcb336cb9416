"""The smallest run that does everything a run does: half a second in a process with the imports done."""

from memstudy.trainers import LanguageModelRun


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
