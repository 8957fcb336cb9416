"""A notebook in JupyterLab, in a real browser, from the first cell to the last; a screenshot goes to build/jupyterlab.

By default, one notebook is run. For all of them: pytest -m by_hand tests/test_jupyterlab.py
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
        yield address
    finally:
        server.terminate()
        server.wait()


@pytest.mark.slow
@pytest.mark.parametrize(
    "stem",
    [pytest.param(stem, marks=[pytest.mark.by_hand] * (stem != QUICKEST)) for stem in project.studies()],
)
def test_a_notebook_runs_from_the_first_cell_to_the_last(browser, lab, stem):
    cells = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4).cells
    n_code = sum(cell.cell_type == "code" for cell in cells)
    page = browser.new_page(viewport={"width": 1300, "height": 30_000})  # only cells in view are in the page
    page.goto(f"{lab}/lab/tree/notebooks/{stem}.ipynb?reset&token=token")
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
    (ROOT / "build" / "jupyterlab").mkdir(parents=True, exist_ok=True)
    page.locator(".jp-Notebook").screenshot(path=ROOT / "build" / "jupyterlab" / f"{stem}.png")
    assert page.locator('[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts() == []
    assert page.locator('.jp-OutputArea [data-mime-type="image/png"]').count() >= 1
    page.close()
