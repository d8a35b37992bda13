"""Whether the hub has something, asked once and with a limit.

Where there is no network, the libraries that load from the hub try each file again for half a minute before they say
so. Asking first, without retries, turns that into one clear line in seconds; what was downloaded before still loads.
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

_FAILURES = cast("tuple[type[Exception], ...]", HfHubHTTPError.__bases__)  # the HTTP client's, and OSError


class NotOnHub(Exception):
    """The hub does not give this, and it was not downloaded before; the message says why."""


@lru_cache(maxsize=16)
def find(name: str, kind: Literal["model", "dataset"]) -> str | None:
    """None if the hub answers and has `name`, else the folder to which it was downloaded before.

    Raises: NotOnHub.
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
