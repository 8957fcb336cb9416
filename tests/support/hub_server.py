"""What a test server must say for the hub's client to take a file from it."""

import http.server
from pathlib import Path

from memstudy import data


class HubHandler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder as the hub does, without a word on stderr."""

    def log_message(self, *args):
        pass

    def end_headers(self):
        # What the hub says of a file, without which its client takes none.
        self.send_header("ETag", Path(self.path.split("?")[0]).name)
        self.send_header("X-Repo-Commit", data.sets.WIKITEXT[1])
        super().end_headers()
