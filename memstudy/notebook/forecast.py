"""The prediction that `explorer` shows, made in another process: a prediction replaces parts of PyTorch meanwhile."""

from __future__ import annotations


def forecast(model: str, gpu: str, batch_size: int, seq_len: int, techniques: tuple[str, ...]) -> str:
    """The report of a training step as HTML, or in one line why there is none."""
    from html import escape

    from pydantic import ValidationError

    from memstudy.attention import Unavailable
    from memstudy.trainers.hub_model import HubModelRun

    sizes = {"batch_size": batch_size, "seq_len": seq_len, "techniques": techniques}
    try:
        return HubModelRun(experiment="explore", model=model, **sizes).foretell(gpu)._repr_html_()
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
    except (ValueError, Unavailable) as error:
        said = str(error)
    return f"<div><b>no prediction:</b> {escape(' '.join(said.split()))}</div>"
