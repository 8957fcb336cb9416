"""The ``config.json`` of a model on the Hugging Face hub; nothing else is fetched, and no code."""

from __future__ import annotations

import functools
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors


@functools.cache
def fetch_config(repository: str) -> Path:
    """Fetch the newest ``config.json`` of ``repository`` (owner/name), once in a process.

    The hub's client does so, with its own cache, ``HF_TOKEN``, ``HF_ENDPOINT`` and ``HF_HUB_OFFLINE``. If the hub does
    not answer in time (`online`), the cache alone is read: the client would try for half a minute.

    Raises
    ------
    ValueError
        When the id is none, the repository is gated or does not exist, has no ``config.json``, or the hub is not
        reached and its cache does not have the file.
    """
    from memstudy.data.sources import online  # imports `datasets`, a second that only a fetch needs

    alone = huggingface_hub.constants.ENDPOINT not in online()
    try:
        return Path(huggingface_hub.hf_hub_download(repository, "config.json", local_files_only=alone))
    except (errors.HFValidationError, errors.HfHubHTTPError, errors.EntryNotFoundError, OSError) as error:
        raise ValueError(f"model {repository}: {_reason(repository, error)}") from None


def _reason(repository: str, error: Exception) -> str:
    logged_in = huggingface_hub.get_token() is not None
    match error:
        case errors.HFValidationError():
            return "this is no hub id, which has the form owner/name"
        case errors.GatedRepoError() if logged_in:
            return f"gated, and your token has no access: ask for it at https://huggingface.co/{repository}"
        case errors.GatedRepoError():
            page = f"https://huggingface.co/{repository}"
            return f"gated: accept the terms at {page}, then log in with `hf auth login` or set HF_TOKEN"
        case errors.RepositoryNotFoundError():
            remedy = "check the id" if logged_in else "check the id; if private, log in with `hf auth login`"
            return f"the hub has no such model; {remedy}"
        case errors.LocalEntryNotFoundError():
            why = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else "the hub is not reached"
            return f"{why} and the cache has no config.json of it; give a name from `memstudy list models` or a path"
        case errors.EntryNotFoundError():
            return "the repository has no config.json; give the id of a model in transformers' format"
    return f"the hub can't give its config.json: {' '.join(str(error).split())[:150]}"
