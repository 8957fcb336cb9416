"""The command line: ``memstudy run | report | plan | predict | fit | advise | serve | list``."""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

import typer

from memstudy.cli.list import list_
from memstudy.cli.plan import plan
from memstudy.cli.predict import advise, fit, predict
from memstudy.cli.report import report
from memstudy.cli.run import run
from memstudy.cli.serve import serve

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="""Which memory technique for which Transformer?

    A study is a notebook. It asks for rows; rows that have no record yet are run, each in a fresh process; every
    table, figure and number of the report is computed from the rows.

    memstudy predict --model gpt2 --batch 8 --seq-len 512 --gpu T4       will it fit? no GPU needed\n
    memstudy fit --model gpt2 --seq-len 512 --gpu T4 --advise            the largest batch\n
    memstudy advise --model gpt2 --batch 64 --seq-len 512 --gpu T4       what makes it fit\n
    memstudy list studies            what there is\n
    memstudy report lab4_grid        run one study at quick scale, typeset build/report.pdf\n
    memstudy run CONFIG.json         one run: a record in results/, whatever becomes of it\n
    memstudy list runs               the records there are\n
    memstudy serve                   ask the trained models, on a web page

    Stopped half-way? The same command goes on: finished runs are never repeated.
    """,
)

for command in (run, report, plan, predict, fit, advise, serve):
    app.command()(command)
app.command(name="list")(list_)


def end_with(arguments: list[str]) -> NoReturn:
    """End this process as the command of ``arguments`` does, without taking the interpreter apart: that takes long."""
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
