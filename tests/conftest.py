"""What several test files need around all their tests; a file asks for it with `pytest.mark.usefixtures`."""

import shutil

import pytest
import torch


@pytest.fixture(scope="module")
def one_thread():
    """Tensors this small gain nothing from a second thread, and lose much when another process has the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Keep tokenizers and blocks out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEMSTUDY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, Debian's own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("no chromium here: apt-get install chromium")
    options = (
        "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
        "--disable-component-update --disable-sync --disable-dev-shm-usage"
    )
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=path, args=options.split())
        yield made
        made.close()
