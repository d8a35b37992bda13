"""Asks the hub once whether it has a model or data set, with a time limit.

Without a network, the libraries that load from the hub retry each file for half a minute before they report an error.
Asking first, without retries, gives one clear line in seconds. Earlier downloads still load.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, cast

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

TIMEOUT_S = 10.0

_FAILURES = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)  # the HTTP client's error and OSError


class NotOnHub(Exception):
    """The hub lacks the name or cannot be reached, and there is no earlier download. The message gives the reason."""


@lru_cache(maxsize=16)
def find(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """Returns None if the hub has `name`, else the folder of an earlier download.

    Raises: NotOnHub: neither exists.
    """
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=TIMEOUT_S)
        return None
    except GatedRepoError:
        why = "its terms must be accepted on the hub first, and then `hf auth login`"
    except (RepositoryNotFoundError, HFValidationError):
        why = f"there is no such {kind}, or it is private"
    except _FAILURES as error:
        lines = str(error).strip().splitlines()
        why = "it was not downloaded before, and the hub cannot be reached" + (f" ({lines[0]})" if lines else "")
    try:
        return snapshot_download(name, repo_type=kind, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise NotOnHub(why) from error
