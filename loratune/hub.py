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
    except GatedRepoError as error:
        raise NotOnHub("the hub asks for its terms to be accepted, and for `hf auth login`") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise NotOnHub(f"nothing of this name is here, and the hub has no such {kind} (or it is private)") from error
    except _FAILURES as error:
        reason = str(error).strip().splitlines()
        why = f" ({reason[0]})" if reason else ""
        try:
            return snapshot_download(name, repo_type=kind, local_files_only=True)
        except LocalEntryNotFoundError:
            raise NotOnHub(
                f"nothing of this name is here, it was not downloaded before, and the hub cannot be reached{why}"
            ) from error
