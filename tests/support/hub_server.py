"""A test server that the client of the Hugging Face hub accepts."""

import http.server
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
