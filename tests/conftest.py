"""What several test files need around all their tests; a file asks for it with `pytest.mark.usefixtures`."""

import gc
import shutil

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("support")
settings.register_profile("thousand")  # what test_bad_input tries more often then


@pytest.fixture(scope="module")
def one_thread():
    """Tensors this small gain nothing from a second thread, and lose much when another process has the core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def young_garbage_only():
    """Spare `measure` the search of all that transformers has made, which takes longer than the step."""
    gc.freeze()
    yield
    gc.unfreeze()


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
