"""Fixtures of several test files; a file asks for them with `pytest.mark.usefixtures`."""

import gc
import shutil

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("support")
settings.register_profile("thousand")  # makes test_bad_input try a thousand examples per test


@pytest.fixture(scope="module")
def one_thread():
    """Run torch on one thread: small tensors gain nothing from a second one, and lose much if its core is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def young_garbage_only():
    """Freeze existing objects: `measure` collects garbage, and scanning transformers takes longer than the step."""
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
    """Headless Chromium, as packaged by Debian."""
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
