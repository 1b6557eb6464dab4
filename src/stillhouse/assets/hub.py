"""Assets of the Hugging Face hub, through its own client, whose cache, mirrors and token hold (HF_HOME, HF_ENDPOINT,
HF_TOKEN) and which continues an interrupted file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import httpx
from huggingface_hub import constants, get_session, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from stillhouse.assets.errors import SourceError
from stillhouse.config.assets import HubSource


def fetch_from_hub(source: HubSource, repository_type: Literal["model", "dataset"], patterns: Sequence[str]) -> Path:
    """The file, or the folder with the files that match `patterns`, in the hub's cache."""
    where = f"hub repository {source.repo} (revision {source.revision or 'main'})"
    hooks = get_session().event_hooks
    if _end_of_patience not in hooks["request"]:
        get_session().event_hooks = {**hooks, "request": [*hooks["request"], _end_of_patience]}
    try:
        if source.file is not None:
            return Path(hf_hub_download(source.repo, source.file, repo_type=repository_type, revision=source.revision))
        return Path(
            snapshot_download(
                source.repo,
                repo_type=repository_type,
                revision=source.revision,
                allow_patterns=list(patterns),
                # Their `*` also matches `/`: a model's subfolders hold other formats of the same weights.
                ignore_patterns=["*/*"] if repository_type == "model" else None,
            )
        )
    except GatedRepoError:
        raise SourceError(f"{where}: is gated: accept its licence on the hub and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise SourceError(f"{where}: does not exist or is private: correct 'repo', or set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise SourceError(f"{where}: has no such revision: correct 'revision'") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, httpx.TransportError) as error:
        # The client wraps what it met on the way; a half answer is a transport error too.
        raise SourceError(
            f"{where}: no network: the hub cannot be reached or broke off ({_first_line(error)}); run the same command "
            "again when it can (what has arrived is kept), set HF_ENDPOINT to a mirror, or give a source of kind path"
        ) from error
    except EntryNotFoundError:
        raise SourceError(f"{where}: has no file {source.file}: correct 'file'") from None
    except HfHubHTTPError as error:
        raise SourceError(f"{where}: the hub answered with an error ({_first_line(error)}): try again later") from error
    except OSError as error:
        if error.errno is not None:
            raise
        # The client's consistency check: a file shorter than the hub said.
        raise SourceError(f"{where}: a file arrived incomplete ({_first_line(error)}): run again") from error


def _end_of_patience(request: httpx.Request) -> None:
    """Give a request that would wait for ever the time of a download: the client lists files without a time limit."""
    limits: dict[str, float | None] = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        part: constants.HF_HUB_DOWNLOAD_TIMEOUT if seconds is None else seconds for part, seconds in limits.items()
    }


def _first_line(error: BaseException) -> str:
    root = error.__cause__ or error
    return (str(root) or type(root).__name__).strip().splitlines()[0][:200]
