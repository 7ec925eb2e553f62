"""Files of the Hugging Face hub at a pinned commit, or an error of one line that says how to do without the hub."""

from pathlib import Path
from typing import Literal

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

HUB_TIMEOUT_S = 10.0
"""Seconds that the hub may take to answer that it has a repository."""


def fetch(repo: str, kind: Literal["model", "dataset"], revision: str, patterns: list[str], remedy: str) -> Path:
    """The folder with the files of a repository that match `patterns`, from the local cache or downloaded into it.

    Raises ValueError at once, ending in `remedy`, when they are neither cached nor on the hub.
    """
    try:
        cached = snapshot_download(
            repo, repo_type=kind, revision=revision, allow_patterns=patterns, local_files_only=True
        )
        return Path(cached)
    except LocalEntryNotFoundError:
        pass
    try:
        # Asked first because it fails at once; the download itself would retry for half a minute.
        HfApi().repo_info(repo, repo_type=kind, revision=revision, timeout=HUB_TIMEOUT_S)
        return Path(snapshot_download(repo, repo_type=kind, revision=revision, allow_patterns=patterns))
    except (HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{repo}: this {kind} at commit {revision[:10]} is not in the local cache and could not be fetched from the hub "
            f"({reason}); {remedy}"
        ) from None
