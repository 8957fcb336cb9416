"""What several test files need around all their tests; a file asks for it with `pytest.mark.usefixtures`."""

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
