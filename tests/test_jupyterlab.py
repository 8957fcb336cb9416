"""Notebooks in JupyterLab, in a real browser, from the first cell to the last; screenshots go to build/jupyterlab.

By default, one study's notebook is run, and one of the magics. For all: pytest -m by_hand tests/test_jupyterlab.py
"""

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest
from support.tiny_models import config_file

from memstudy import project

ROOT = Path(__file__).parents[1]
QUICKEST = "what_fits"
MINUTES = 5


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab on a copy of the notebooks, where saving does no harm."""
    place = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", place / "notebooks")
    (place / "benchmarks").symlink_to(ROOT / "benchmarks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--IdentityProvider.token=token", f"--ServerApp.root_dir={place}", "--LabApp.extension_manager=readonly",
    ]  # fmt: skip
    log = place / "log"
    with log.open("w") as written:
        server = subprocess.Popen(command, stdout=written, stderr=written, env=os.environ | {"HOME": str(place)})
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 60
        while True:
            try:
                urlopen(f"{address}/api/status?token=token").close()
                break
            except URLError:
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.2)
        yield address, place
    finally:
        server.terminate()
        server.wait()


def run_all(browser, address, path, n_code):
    """Open the notebook at `path`, run its `n_code` cells of code, and return the page."""
    page = browser.new_page(viewport={"width": 1300, "height": 30_000})  # only cells in view are in the page
    page.goto(f"{address}/lab/tree/{path}?reset&token=token")
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=60_000)
    page.wait_for_selector(".jp-CodeCell")
    page.wait_for_timeout(1000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(
        """n => [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")]
             .filter(prompt => /\\[\\d+\\]/.test(prompt.textContent)).length === n
           || document.querySelector('[data-mime-type="application/vnd.jupyter.error"]')""",
        arg=n_code, timeout=MINUTES * 60_000,
    )  # fmt: skip
    return page


def screenshot(page, name):
    (ROOT / "build" / "jupyterlab").mkdir(parents=True, exist_ok=True)
    page.locator(".jp-Notebook").screenshot(path=ROOT / "build" / "jupyterlab" / f"{name}.png")


def errors(page):
    return page.locator('[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()


@pytest.mark.slow
@pytest.mark.parametrize(
    "stem",
    [pytest.param(stem, marks=[pytest.mark.by_hand] * (stem != QUICKEST)) for stem in project.studies()],
)
def test_a_notebook_runs_from_the_first_cell_to_the_last(browser, lab, stem):
    cells = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4).cells
    page = run_all(browser, lab[0], f"notebooks/{stem}.ipynb", sum(cell.cell_type == "code" for cell in cells))
    screenshot(page, stem)
    assert errors(page) == []
    assert page.locator('.jp-OutputArea [data-mime-type="image/png"]').count() >= 1
    page.close()


STEP = """
import torch
model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.GELU(), torch.nn.Linear(1024, 256))
optimizer = torch.optim.AdamW(model.parameters())
inputs = torch.randn(512, 256)

def step():
    model(inputs).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.slow
def test_magics_reports_and_widgets_in_a_notebook(browser, lab):
    """Each is shown, and the widgets answer: at first, and when a setting changes."""
    address, place = lab
    sources = [
        "%load_ext memstudy",
        "%%predict --gpu T4 there" + STEP,
        "%%memory here" + STEP,
        "from memstudy.profiler import compare\ncompare(there, here)",
        f"import memstudy\nmemstudy.explore(model={config_file(place, 'bert')!r}, batch_size=2, seq_len=16)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, place / "magics.ipynb")
    page = run_all(browser, address, "magics.ipynb", len(sources))
    page.get_by_role("button", name="Predict").click()
    answer = page.locator(".widget-html", has_text="predicted: fits")
    answer.filter(has_text="T4, ").wait_for(timeout=MINUTES * 60_000)
    page.locator(".widget-dropdown select").select_option("A100-80GB")
    answer.filter(has_text="A100-80GB, ").wait_for(timeout=MINUTES * 60_000)
    screenshot(page, "magics")
    assert errors(page) == []
    assert page.locator(".jp-OutputArea svg[viewBox]").count() >= 2 + 2 + 2 + 2
    assert page.locator(".jp-OutputArea table").count() >= 1
    page.close()
