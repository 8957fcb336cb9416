"""Results that are computed from data once and kept in the cache folder."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from memstudy.machine import cache_folder


def hash_of(*texts: str) -> str:
    """The first 16 hex digits of the SHA-256 of ``texts``."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode())
    return digest.hexdigest()[:16]


def cached(name: str, write: Callable[[Path], None]) -> Path:
    """Return the cache's folder ``name``; the first call fills the folder with ``write``, completely or not at all."""
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=folder.parent, prefix=".partial-")
    except OSError as error:
        raise ValueError(f"{error}; set MEMSTUDY_CACHE to a folder that can be written") from error
    with scratch as path:
        part = Path(path) / "part"
        part.mkdir()
        write(part)
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, with equal content
                raise
    return folder
