"""The command line: ``memstudy run | report | plan | predict | compare | fit | advise | validate | serve | list``."""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

import typer

from memstudy.cli.advise import advise
from memstudy.cli.compare import compare
from memstudy.cli.fit import fit
from memstudy.cli.list import list_
from memstudy.cli.plan import plan
from memstudy.cli.predict import predict
from memstudy.cli.report import report
from memstudy.cli.run import run
from memstudy.cli.serve import serve
from memstudy.cli.validate import validate

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="""Which memory technique for which Transformer?

    A study is a notebook that asks for rows. Each row without a record is run, in a fresh process. Every table, figure
    and number of the report is computed from the rows.

    \b
    Without a GPU, in seconds:
      memstudy predict --model gpt2 --batch 8 --seq-len 512 --gpu T4
          will it fit, how long does a step take
      memstudy compare --model gpt2 --batch 8 --seq-len 512 --gpu T4,L4
          which card, which technique
      memstudy fit --model gpt2 --seq-len 512 --gpu T4
          the largest batch
      memstudy advise --model gpt2 --batch 64 --seq-len 512 --gpu T4
          what makes it fit

    \b
    The studies:
      memstudy list studies       also: models, gpus, techniques, ...
      memstudy report lab4_grid   run one at quick scale, write build/report.pdf
      memstudy run CONFIG.json    one run; its record says how it ended
      memstudy list runs          the runs recorded so far
      memstudy serve              question the trained models on a web page

    \b
    With a GPU:
      memstudy validate --quick   the predictions against this machine's GPU

    Stopped half-way? Repeat the command: finished runs are never repeated.
    """,
)

for command in (run, report, plan, predict, compare, fit, advise, validate, serve):
    app.command()(command)
app.command(name="list")(list_)


def end_with(arguments: list[str]) -> NoReturn:
    """Run the command ``arguments`` and exit with its status, without the interpreter's slow shutdown."""
    status: object = 1
    try:
        app(arguments, prog_name="memstudy")
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def main() -> NoReturn:
    """The command ``memstudy``."""
    end_with(sys.argv[1:])
