"""Test servers that the client of the Hugging Face hub accepts."""

import functools
import http.server
import threading
from contextlib import contextmanager
from pathlib import Path

from memstudy import data


class HubHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder as the hub does, without logging."""

    def log_message(self, *args):
        pass

    def end_headers(self):
        # The client downloads no file without these headers.
        self.send_header("ETag", Path(self.path.split("?")[0]).name)
        self.send_header("X-Repo-Commit", data.sets.WIKITEXT[1])
        super().end_headers()


class ModelHubHandler(HubHandler):
    """Serves the models ``owner/name/resolve/main/``; those with a file ``gated`` to the token ``granted`` alone.

    Refusals have the status and the ``X-Error-Code`` of the real hub.
    """

    def send_head(self):
        token = self.headers.get("Authorization")
        repository = Path(self.directory, *self.path.split("/")[1:3])
        if not repository.is_dir():
            return self._refuse(404 if token else 401, "RepoNotFound")
        if (repository / "gated").exists() and token != "Bearer granted":
            return self._refuse(403 if token else 401, "GatedRepo")
        if not Path(self.translate_path(self.path)).is_file():
            return self._refuse(404, "EntryNotFound")
        return super().send_head()

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serving(folder, handler=HubHandler):
    """Serve a folder over HTTP on this machine; yields the address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
